"""Config of the validation during a run."""

from pydantic import BaseModel, Field

from byteloom.core.locations import LocationText


class ValidationConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """What is measured during a run beside the training loss."""

    shards: LocationText | None = None
    """Corpus (folder or URL) that training does not read; every byte of it is scored each time. None: no validation."""
    every: int = Field(default=500, ge=1)
    """Steps between validations; there is one before the first step and one after the last as well."""
