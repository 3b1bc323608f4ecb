"""AdamW, and Adam."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.optim import Optimizer

from pretrain.models.base import ByteModel
from pretrain.optim.config import OptimizerConfig, decoupled_decay_warnings
from pretrain.optim.groups import ParameterRule, parameter_groups, parameter_rules, with_moments
from pretrain.optim.registry import OptimizerEntry, register_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of the mean and the mean square of gradients."""
FIELDS = frozenset({"beta1", "beta2", "epsilon", "weight_decay", "decay_embeddings"})
"""Config fields of AdamW and Adam."""


def adam_of(
    config: OptimizerConfig, parameters: Mapping[str, nn.Parameter], rules: Mapping[str, ParameterRule]
) -> Optimizer:
    """Return Adam if the config names it, else AdamW, without moments.

    Args:
        config: the name and the settings.
        parameters: by name.
        rules: of the parameters, by name.
    """
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(
        parameter_groups(config, parameters, rules),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def adam_with_moments(
    config: OptimizerConfig, parameters: Mapping[str, nn.Parameter], rules: Mapping[str, ParameterRule]
) -> Optimizer:
    """Return the optimizer of `adam_of` with zero moments."""
    return with_moments(adam_of(config, parameters, rules), *MOMENTS, "step")


def _build(config: OptimizerConfig, model: ByteModel) -> list[Optimizer]:
    return [adam_with_moments(config, model.trained_parameters(), parameter_rules(config, model))]


register_optimizer(
    OptimizerEntry(
        name="adamw",
        build=_build,
        moments=MOMENTS,
        fields=FIELDS,
        works_on_shards=True,
        has_sized_steps=True,
        warnings=decoupled_decay_warnings,
    )
)
register_optimizer(
    OptimizerEntry(
        name="adam",
        build=_build,
        moments=MOMENTS,
        fields=FIELDS,
        works_on_shards=True,
        has_sized_steps=True,
        default_decay=0.0,
    )
)
