"""Muon for the matrices within blocks, and AdamW for the other parameters."""

import torch
from torch.optim import Optimizer

from pretrain.models.base import ByteModel
from pretrain.optim import adamw
from pretrain.optim.config import OptimizerConfig, decoupled_decay_warnings
from pretrain.optim.groups import decaying, parameter_groups, with_moments
from pretrain.optim.registry import OptimizerEntry, register_optimizer

MOMENTUM = "momentum_buffer"
"""Name of the mean of gradients of a matrix."""


def _build(config: OptimizerConfig, model: ByteModel) -> list[Optimizer]:
    named = dict(model.named_parameters())
    decays = decaying(config, model)
    outside = model.outside_units()
    matrices = {name: p for name, p in named.items() if name not in outside and p.dim() == 2}
    rest = {name: p for name, p in named.items() if name not in matrices}
    muon = torch.optim.Muon(
        parameter_groups(config, matrices, decays),
        lr=config.learning_rate,
        momentum=config.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return [with_moments(muon, MOMENTUM), adamw.adam_with_moments(config, rest, decays)]


register_optimizer(
    OptimizerEntry(
        name="muon",
        build=_build,
        moments=(MOMENTUM, *adamw.MOMENTS),
        fields=adamw.FIELDS | {"momentum"},
        warnings=decoupled_decay_warnings,
    )
)
