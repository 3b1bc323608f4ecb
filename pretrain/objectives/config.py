"""Config of the objective."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, ValidationInfo, field_validator, model_validator

from byteloom.core.registries.names import RegisteredName, validated_options
from byteloom.core.validation import describe_value
from pretrain.objectives.registry import OBJECTIVES, ObjectiveEntry


class ObjectiveConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """What the model predicts of each row."""

    name: Annotated[str, RegisteredName(OBJECTIVES)] = "causal"
    """Name of the objective. causal: each id from those before it. masked: hidden bytes from all other ids (Devlin et
    al. 2019), for an encoder or a perceiver_io. span_corruption: hidden spans (Raffel et al. 2020), for an
    encoder_decoder. prefix: the rest of a row whose first ids all see each other, for a transformer. conditional: the
    target of a pair from its source. classification: the label of a document, one byte of a pair, for an encoder or a
    perceiver_io. Losses of different objectives have different names and cannot be compared: bits per byte, bits per
    masked byte."""
    share: float = Field(default=0.15, gt=0, lt=1)
    """For masked and span_corruption: share of a row that is hidden and predicted."""
    span_length: float = Field(default=20.0, ge=1)
    """For span_corruption: mean number of ids of a hidden span. ByT5 has 20, and T5 has 3 word pieces."""
    options: dict[str, Any] = Field(default={}, validate_default=True)
    """Options of an objective of another package. Byteloom's own have none."""

    @field_validator("options")
    @classmethod
    def _options_are_the_objectives(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "name" not in info.data:  # it is wrong, which is reported
            return value
        entry = OBJECTIVES.get(info.data["name"])
        return validated_options("objective.options", entry.options, value, owner=f"objective.name {entry.name}")

    @model_validator(mode="after")
    def _fields_are_used(self) -> Self:
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name not in {"name", "options"} | self.entry.fields and value != field.default:
                raise ValueError(
                    f"objective.{name} is {describe_value(value)}, and objective.name {self.name} does not use it"
                )
        return self

    @property
    def entry(self) -> ObjectiveEntry:
        """Return what the objective declares."""
        return OBJECTIVES.get(self.name)

    @property
    def metric(self) -> str:
        """Return the name of its loss among metrics; see `ObjectiveEntry.metric`."""
        return self.entry.metric
