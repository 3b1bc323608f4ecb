"""Config of the validation during a run."""

from typing import Annotated, Self

from pydantic import BaseModel, Field, model_validator

from byteloom.core.storage.locations import LocationText
from data_pipeline.stream.config import Digest
from pretrain.evaluation.beginning import Beginning

CorpusName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
"""Name of a validation corpus, which is part of the names of its numbers."""


class ValidationCorpus(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """One of several validation corpora. A recipe may give its folder or URL alone."""

    shards: LocationText
    """Folder or URL of a corpus that training does not read."""
    shards_sha256: Digest | None = None
    """Digest that the corpus must have (`byteloom inspect --digest CORPUS` prints it); null accepts any."""

    @model_validator(mode="before")
    @classmethod
    def _from_location(cls, value: object) -> object:
        return {"shards": value} if isinstance(value, str) else value


class ValidationConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Validation during a run. Set `shards`, or `corpora`, or neither."""

    shards: LocationText | None = None
    """Corpus (folder or URL) that validations score in full. Training does not read it. Null: no validation."""
    shards_sha256: Digest | None = None
    """Digest that the corpus `shards` must have; null accepts any. `byteloom inspect --digest CORPUS` prints it."""
    corpora: dict[CorpusName, ValidationCorpus] = Field(default={})
    """Several such corpora, each under a name of your choice. Each is a folder or URL, or a section of shards and
    shards_sha256. Each has its own bits per byte, as `validation/NAME/bits_per_byte`; `validation/bits_per_byte` is
    that of all their bytes together."""
    every: int = Field(default=500, ge=1)
    """Steps between validations. There is also one before the first step and one after the last."""
    begin: Beginning = Beginning.auto
    """Context of the first byte of each document: auto, separator or start. auto: a separator, which is not scored, if
    documents follow separators in training; else the start of a row."""

    @model_validator(mode="after")
    def _is_one_or_several(self) -> Self:
        if self.shards is not None and self.corpora:
            raise ValueError("name either shards, a corpus, or corpora, several of them")
        if self.shards_sha256 is not None and self.corpora:
            raise ValueError("shards_sha256 is the digest of shards; each of corpora has its own shards_sha256")
        return self

    def by_name(self) -> dict[str, ValidationCorpus]:
        """Return the corpora by name; the name of a single corpus is empty."""
        if self.shards is None:
            return dict(self.corpora)
        return {"": ValidationCorpus(shards=self.shards, shards_sha256=self.shards_sha256)}
