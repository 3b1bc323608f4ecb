"""The optimizer and its learning rate, a function of the step."""

import math
from collections.abc import Container, Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field
from torch import nn
from torch.optim import Optimizer

from byteloom.core.validation import Fault, Mismatch
from pretrain.models.base import ByteModel


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


OptimizerName = Literal["adamw", "adam", "muon"]


class OptimizerConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """The optimizer, its defaults the MEGABYTE paper's (A.1)."""

    name: OptimizerName = "adamw"
    """Which one. adamw: with decoupled decay (Loshchilov and Hutter 2019), which is also what the MEGABYTE paper's code
    calls Adam. adam: Kingma and Ba 2015, as Perceiver AR's and Transformer-XL's, without decay. muon: Muon (Jordan
    2024) for the matrices within blocks, at updates of AdamW's size (Liu et al. 2025), so that one rate serves both,
    and AdamW for all else. It needs whole matrices: engine.name ddp."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the mean of gradients, a step."""
    beta2: float = Field(default=0.98, ge=0, lt=1)
    """Decay of the mean of squared gradients, a step."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Of muon: decay of the mean of its matrices' gradients, a step."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Of matrices, and of tables if `decay_embeddings`; norms, biases and pads have none. Decoupled from the gradient,
    but with adam a part of it (L2). Null is 0.1, and 0 with adam."""
    decay_embeddings: bool = True
    """Whether tables decay too: embeddings, of which most are the output layer as well, and learned positions."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm when theirs is larger."""
    schedule: ScheduleConfig = ScheduleConfig()

    @property
    def decay(self) -> float:
        if self.weight_decay is not None:
            return self.weight_decay
        return 0.0 if self.name == "adam" else 0.1


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


def schedule_mismatch(schedule: ScheduleConfig, steps: int) -> Mismatch | None:
    """Return why a schedule does not fit a run of `steps`; None if it fits.

    Warm-up must end before the run does, and before decay begins. Then `learning_rate_at` never falls faster than the
    decay alone does.
    """
    warmup = schedule.warmup_steps
    if warmup >= steps:
        return Mismatch(
            f"optimizer.schedule.warmup_steps ({warmup}) must be less than train.steps ({steps}); the learning rate "
            "would never reach its peak",
            ("optimizer.schedule.warmup_steps", "train.steps"),
        )
    if schedule.shape == "wsd" and warmup + schedule.decay_fraction * steps > steps + 1:
        most = math.floor(1000 * (steps - warmup) / steps) / 1000
        return Mismatch(
            f"optimizer.schedule.decay_fraction ({schedule.decay_fraction}) must be at most {most}; decay would begin "
            f"within the {warmup} warm-up steps of a run of {steps}",
            ("optimizer.schedule.decay_fraction", "optimizer.schedule.warmup_steps", "train.steps"),
        )
    return None


def optimizer_warnings(config: OptimizerConfig) -> list[Fault]:
    """Return what is allowed and yet is most often a slip, such as 3e3 for 3e-3."""
    found = []
    for name, value in (("learning_rate", config.learning_rate), ("epsilon", config.epsilon)):
        if value > 1:
            exponent = math.floor(math.log10(value))
            hint = f"; did you mean {value / 10**exponent:g}e-{exponent}?" if exponent else ""
            field = f"optimizer.{name}"
            found.append(Fault(field, f"{field} is {value:g}, and few models train with more than 1{hint}"))
    share = config.learning_rate * config.decay
    if config.name != "adam" and share >= 1:
        found.append(
            Fault(
                "optimizer.weight_decay",
                f"optimizer.weight_decay ({config.decay:g}) times optimizer.learning_rate ({config.learning_rate:g}) "
                f"is {share:g}; from 1 on, a step takes more from a weight than there is",
            )
        )
    return found


def build_optimizers(config: OptimizerConfig, model: ByteModel) -> list[Optimizer]:
    """What together updates every parameter, with moments in place (zeros).

    So a checkpoint can be read into them before the first step. `Optimizer.state` of a parameter has its moments by the
    names that they have in checkpoints and, but for Muon's, the number of steps done as `step`, an fp32 scalar.
    """
    named = dict(model.named_parameters())
    decays = decaying(config, model)
    if config.name != "muon":
        return [_with_moments(adam_of(config, named, decays), "exp_avg", "exp_avg_sq", "step")]
    outside = model.outside_units()
    matrices = {name: p for name, p in named.items() if name not in outside and p.dim() == 2}
    rest = {name: p for name, p in named.items() if name not in matrices}
    muon = torch.optim.Muon(
        _groups(config, matrices, decays),
        lr=config.learning_rate,
        momentum=config.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = adam_of(config, rest, decays)
    return [_with_moments(muon, "momentum_buffer"), _with_moments(adamw, "exp_avg", "exp_avg_sq", "step")]


def decaying(config: OptimizerConfig, model: ByteModel) -> set[str]:
    """The names of parameters that decay; told by their modules and shapes, so before an engine cuts them up."""
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d))}

    def decays(name: str, parameter: nn.Parameter) -> bool:
        is_table = parameter.dim() >= 2 and not name.endswith("bias")  # where it is no matrix
        return id(parameter) in matrices or (is_table and config.decay_embeddings)

    return {name for name, parameter in model.named_parameters() if decays(name, parameter)}


def adam_of(config: OptimizerConfig, parameters: Mapping[str, nn.Parameter], decays: Container[str]) -> Optimizer:
    """Adam, or AdamW, of some parameters by name, without moments."""
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(
        _groups(config, parameters, decays),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def _groups(
    config: OptimizerConfig, parameters: Mapping[str, nn.Parameter], decays: Container[str]
) -> list[dict[str, Any]]:
    """Those that decay, and those that do not; either may be missing."""
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in parameters.items() if name in decays], "weight_decay": config.decay},
        {"params": [p for name, p in parameters.items() if name not in decays], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _with_moments(optimizer: Optimizer, *names: str) -> Optimizer:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                name: torch.zeros((), device=parameter.device) if name == "step" else torch.zeros_like(parameter)
                for name in names
            }
    return optimizer
