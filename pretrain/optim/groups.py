"""Building of optimizers, their parameter groups and their moments."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from byteloom.core.errors import CorrectableError
from pretrain.models.base import ByteModel
from pretrain.optim.config import OptimizerConfig

MULTIPLIER = "rate_multiplier"
"""Key of a parameter group: the factor of the learning rate. 1 if the key is missing."""


class OptimizerError(CorrectableError):
    """An optimizer does not fit a model."""


def build_optimizers(config: OptimizerConfig, model: ByteModel) -> list[Optimizer]:
    """Return optimizers that together update every trained parameter, with moments in place (zeros).

    A checkpoint can be read into them before the first step. `Optimizer.state` of a parameter has its moments by their
    names in checkpoints. Most have the number of steps done as `step` too, an fp32 scalar.

    Raises:
        OptimizerError: the optimizer ignores the multipliers that the model declares.
    """
    optimizers, rules = config.entry.build(config, model), parameter_rules(config, model)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    multipliers = {id(each): group.get(MULTIPLIER, 1.0) for group in groups for each in group["params"]}
    for name, parameter in model.trained_parameters().items():
        if multipliers[id(parameter)] != rules[name].rate_multiplier:
            raise OptimizerError(
                f"{name} has the learning-rate multiplier {rules[name].rate_multiplier:g}, and optimizer.name "
                f"{config.name} makes its groups without multipliers; use adamw, adam or muon"
            )
    return optimizers


@dataclass(frozen=True)
class ParameterRule:
    """How an optimizer treats a parameter."""

    decays: bool
    """Whether weight decay applies."""
    rate_multiplier: float = 1.0
    """Factor of the learning rate."""
    decay_multiplier: float = 1.0
    """Factor of the weight decay, which is then multiplied by the rate."""


def parameter_rules(config: OptimizerConfig, model: ByteModel) -> dict[str, ParameterRule]:
    """Return the rule of each parameter, by name.

    Modules and shapes decide it, so this is called before an engine shards parameters.

    Raises:
        OptimizerError: the model declares a multiplier that is not a positive number.
    """
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d))}

    def decays(name: str, parameter: nn.Parameter) -> bool:
        is_table = parameter.dim() >= 2 and not name.endswith("bias")  # unless it is a matrix
        return model.may_decay(name) and (id(parameter) in matrices or (is_table and config.decay_embeddings))

    rules, whole = {}, config.entry.whole_matrices(model)
    for name, parameter in model.named_parameters():
        multiplier, scaled = model.rate_multiplier(name), 1.0
        if not 0 < multiplier < math.inf:
            raise OptimizerError(
                f"{type(model).__name__}.rate_multiplier is {multiplier} for {name}; it must be above 0 and finite"
            )
        if name in model.scales:
            scale = model.scales[name]
            multiplier, scaled = scale.multiplier, scale.muon_rate if name in whole else scale.rate
        is_decayed = decays(name, parameter)
        # The share that a step takes from a weight stays that of the base (Wortsman et al. 2023, arXiv:2309.14322).
        rules[name] = ParameterRule(is_decayed, multiplier * scaled, 1 / scaled if is_decayed else 1.0)
    return rules


def parameter_groups(
    config: OptimizerConfig, parameters: Mapping[str, nn.Parameter], rules: Mapping[str, ParameterRule]
) -> list[dict[str, Any]]:
    """Return one group of parameters for each rule that they have, those that decay first.

    Args:
        config: the weight decay.
        parameters: by name.
        rules: by name, of these parameters and possibly others.
    """
    members: dict[ParameterRule, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        members.setdefault(rules[name], []).append(parameter)
    return [
        {
            "params": members[rule],
            "weight_decay": config.decay * rule.decay_multiplier if rule.decays else 0.0,
            MULTIPLIER: rule.rate_multiplier,
        }
        for rule in sorted(members, key=lambda rule: (not rule.decays, -rule.rate_multiplier))
    ]


def set_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Set the learning rate of each group: a rate times the group's multiplier.

    Args:
        optimizer: the groups.
        learning_rate: rate of the schedule.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get(MULTIPLIER, 1.0)


def with_moments(optimizer: Optimizer, *names: str) -> Optimizer:
    """Give an optimizer zero moments, and return it.

    Args:
        optimizer: without state.
        names: of the moments; `step` is a scalar, the others have the shape of their parameter.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                name: torch.zeros((), device=parameter.device) if name == "step" else torch.zeros_like(parameter)
                for name in names
            }
    return optimizer
