"""Config of the optimizer."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, ValidationInfo, field_validator, model_validator

from byteloom.core.registries.names import RegisteredName, validated_options
from byteloom.core.validation import Fault, describe_value
from pretrain.optim.registry import OPTIMIZERS, OptimizerEntry
from pretrain.optim.schedules import ScheduleConfig

COMMON_FIELDS = frozenset({"name", "learning_rate", "scaling", "base", "clip_norm", "schedule", "options"})
"""Fields that every optimizer has."""


class OptimizerConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Optimizer and its learning-rate schedule. The defaults are those of the MEGABYTE paper (A.1)."""

    name: Annotated[str, RegisteredName(OPTIMIZERS)] = "adamw"
    """Name of the optimizer. adamw: with decoupled decay (Loshchilov and Hutter 2019), which the MEGABYTE paper's code
    calls Adam. adam: Kingma and Ba 2015, as Perceiver AR's and Transformer-XL's, without decay. muon: Muon (Jordan
    2024) for the matrices within blocks, at updates of AdamW's size (Liu et al. 2025), so that one rate serves both,
    and AdamW for the other parameters. It is for ddp, fsdp and hsdp. Queries, keys and values have their own updates,
    and so have both maps of SwiGLU."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay per step of the mean of gradients."""
    beta2: float = Field(default=0.98, ge=0, lt=1)
    """Decay per step of the mean of squared gradients."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Number added to the root of the second moment."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """For muon: decay per step of the mean of its matrices' gradients."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Decay of matrices, and of tables if `decay_embeddings`. Norms, biases and pads have none. The decay is decoupled
    from the gradient; with adam it is part of the gradient (L2). Null is 0.1, and 0 with adam."""
    decay_embeddings: bool = True
    """Whether tables decay too: embeddings and learned positions. Most embeddings are also the output layer."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Largest global norm of the gradient. A larger gradient is scaled down to it."""
    scaling: Literal["standard", "mup"] = "standard"
    """How first values and rates depend on widths. standard: they do not. mup: maximal update parametrization (Yang et
    al. 2022), in which the best `learning_rate` of the base model is that of wider models too."""
    base: dict[str, Any] = {}
    """For mup: fields of `model` that differ in the base model. An example is {width: 256, heads: 4}. They are widths,
    and numbers of heads that keep the width of a head."""
    schedule: ScheduleConfig = ScheduleConfig()
    options: dict[str, Any] = Field(default={}, validate_default=True)
    """Options of an optimizer of another package. adamw, adam and muon have none."""

    @field_validator("options")
    @classmethod
    def _options_are_the_optimizers(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "name" not in info.data:  # it is wrong, which is reported
            return value
        entry = OPTIMIZERS.get(info.data["name"])
        return validated_options("optimizer.options", entry.options, value, owner=f"optimizer.name {entry.name}")

    @model_validator(mode="after")
    def _fields_are_used(self) -> Self:
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name not in COMMON_FIELDS | self.entry.fields and value != field.default:
                raise ValueError(
                    f"optimizer.{name} is {describe_value(value)}, and optimizer.name {self.name} does not use it"
                )
        return self

    @model_validator(mode="after")
    def _scaling_has_a_base(self) -> Self:
        if self.scaling == "standard":
            if self.base:
                raise ValueError("optimizer.base is the base model of optimizer.scaling mup; set that, or remove it")
            return self
        if not self.base:
            raise ValueError(
                "optimizer.scaling mup needs optimizer.base: the widths of the model at which learning_rate was found, "
                "such as {width: 256, heads: 4}"
            )
        if not self.entry.has_sized_steps:
            raise ValueError(
                f"optimizer.scaling mup knows the rates of adamw, adam and muon, not of optimizer.name {self.name}"
            )
        if self.name == "adam" and self.decay:
            raise ValueError("optimizer.scaling mup with adam needs optimizer.weight_decay 0; adamw's decay is scaled")
        return self

    @property
    def entry(self) -> OptimizerEntry:
        """Return what the optimizer declares."""
        return OPTIMIZERS.get(self.name)

    @property
    def decay(self) -> float:
        """Return the weight decay, with the optimizer's default filled in."""
        return self.entry.default_decay if self.weight_decay is None else self.weight_decay


def optimizer_warnings(config: OptimizerConfig) -> list[Fault]:
    """Return values that are valid but most often a mistake, such as 3e3 for 3e-3."""
    found = []
    for name, value in (("learning_rate", config.learning_rate), ("epsilon", config.epsilon)):
        if value > 1:
            exponent = math.floor(math.log10(value))
            hint = f"; did you mean {value / 10**exponent:g}e-{exponent}?" if exponent else ""
            field = f"optimizer.{name}"
            found.append(Fault(field, f"{field} is {value:g}, and few models train with more than 1{hint}"))
    return [*found, *config.entry.warnings(config)]


def decoupled_decay_warnings(config: OptimizerConfig) -> list[Fault]:
    """Return a warning if decoupled decay removes a whole weight in one step."""
    share = config.learning_rate * config.decay
    if share < 1:
        return []
    return [
        Fault(
            "optimizer.weight_decay",
            f"optimizer.weight_decay ({config.decay:g}) times optimizer.learning_rate ({config.learning_rate:g}) "
            f"is {share:g}; from 1 on, a step takes more from a weight than there is",
        )
    ]
