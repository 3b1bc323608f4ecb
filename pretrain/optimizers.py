"""The optimizer and its learning rate, a function of the step."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import nn


class ScheduleConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """The learning rate over a run: a linear warm-up, then one of four shapes."""

    shape: Literal["polynomial", "cosine", "constant", "wsd"] = "polynomial"
    """After the warm-up: polynomial decay, half a cosine, constant, or warm-up-stable-decay (constant, then linear
    decay over the last `decay_fraction` of the run)."""
    warmup_steps: int = Field(default=500, ge=0)
    """Steps in which the rate rises from 0 to `learning_rate`."""
    final_fraction: float = Field(default=0.0, ge=0, le=1)
    """Where decay ends, as a share of `learning_rate`; reached when the last step is done."""
    power: float = Field(default=1.0, gt=0)
    """Of the polynomial; 1 is a straight line, as in the MEGABYTE paper."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """Share of the run that decays, for wsd."""


class OptimizerConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """AdamW (Loshchilov and Hutter 2019), its defaults the MEGABYTE paper's (A.1)."""

    name: Literal["adamw"] = "adamw"
    """Which optimizer."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the mean of gradients, a step."""
    beta2: float = Field(default=0.98, ge=0, lt=1)
    """Decay of the mean of squared gradients, a step."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay of tensors with two or more axes; norms and pads have none."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm when theirs is larger."""
    schedule: ScheduleConfig = ScheduleConfig()


def learning_rate_at(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of update number `step` (the first is 0) in a run of `steps`."""
    schedule = config.schedule
    if step < schedule.warmup_steps:
        return config.learning_rate * (step + 1) / schedule.warmup_steps
    progress = min((step - schedule.warmup_steps) / max(steps - schedule.warmup_steps, 1), 1.0)
    if schedule.shape == "constant":
        height = 1.0
    elif schedule.shape == "polynomial":
        height = (1 - progress) ** schedule.power
    elif schedule.shape == "cosine":
        height = (1 + math.cos(math.pi * progress)) / 2
    else:
        height = min((steps - step) / (schedule.decay_fraction * steps), 1.0)
    return config.learning_rate * (schedule.final_fraction + (1 - schedule.final_fraction) * height)


def build_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW with its moments in place (zeros), so that a checkpoint can be read into them before the first step."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True
    )
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer
