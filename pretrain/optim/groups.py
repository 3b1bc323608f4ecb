"""Parameter groups and moments of optimizers."""

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from pretrain.models.base import ByteModel
from pretrain.optim.config import OptimizerConfig


def decaying(config: OptimizerConfig, model: ByteModel) -> set[str]:
    """Return the names of the parameters that decay.

    Modules and shapes decide it, so this is called before an engine shards parameters.
    """
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d))}

    def decays(name: str, parameter: nn.Parameter) -> bool:
        is_table = parameter.dim() >= 2 and not name.endswith("bias")  # unless it is a matrix
        return id(parameter) in matrices or (is_table and config.decay_embeddings)

    return {name for name, parameter in model.named_parameters() if decays(name, parameter)}


def parameter_groups(
    config: OptimizerConfig, parameters: Mapping[str, nn.Parameter], decays: Container[str]
) -> list[dict[str, Any]]:
    """Return the group of parameters that decay and the group of those that do not, without empty groups.

    Args:
        config: the weight decay.
        parameters: by name.
        decays: names of the parameters that decay.
    """
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in parameters.items() if name in decays], "weight_decay": config.decay},
        {"params": [p for name, p in parameters.items() if name not in decays], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


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
