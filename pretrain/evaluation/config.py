"""Config of the validation during a run."""

from pydantic import BaseModel, Field

from byteloom.core.locations import LocationText


class ValidationConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Validation during a run."""

    shards: LocationText | None = None
    """Corpus (folder or URL) that training does not read; each validation scores every byte. None: no validation."""
    every: int = Field(default=500, ge=1)
    """Steps between validations. There is also one before the first step and one after the last."""
