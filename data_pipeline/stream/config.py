"""Config of what a run reads: one corpus, or a mixture of several, and the order of their sequences."""

import re
from itertools import pairwise
from typing import Annotated, Self

from pydantic import BaseModel, Field, StringConstraints, model_validator

from byteloom.core.storage.locations import LocationText
from data_pipeline.corpus.storage.remote import RemoteConfig
from data_pipeline.stream.byte_stream import PackingConfig
from data_pipeline.stream.mixture import left_out

ONLY_SOURCE = "corpus"
"""Name of the source of a run that reads one corpus."""


Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
"""Digest of a corpus, as `byteloom inspect --digest` prints it."""


class SourceConfig(PackingConfig, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """One corpus of a mixture."""

    shards: LocationText
    """Folder or URL of a corpus that `byteloom prepare` wrote."""
    shards_sha256: Digest | None = None
    """Digest that the corpus must have (`byteloom inspect --digest CORPUS` prints it); null accepts any."""
    weight: float = Field(default=1.0, ge=0)
    """Sequences of this source in proportion to the other sources' weights, from the first step on."""


class StageConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """A change of a mixture's weights."""

    step: int = Field(ge=1)
    """The new weights hold after this many steps."""
    weights: dict[str, Annotated[float, Field(ge=0)]]
    """Weights by source; a source that is not named keeps its weight."""


class DataConfig(PackingConfig, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Data of a run and their order. Set either `shards` or `mixture`."""

    shards: LocationText | None = None
    """Corpus that `byteloom prepare` wrote: a folder or a URL."""
    shards_sha256: Digest | None = None
    """Digest that the corpus must have; null accepts any. `byteloom inspect --digest CORPUS` prints it."""
    mixture: dict[str, SourceConfig] = Field(default={})
    """Several corpora by weight, instead of `shards`. Each has a name of your choice, and its own shards, weight,
    packing, documents and separate_documents."""
    stages: tuple[StageConfig, ...] = ()
    """Changes of the mixture's weights during the run: a list of step and weights. A source that is added to a run has
    weight 0 until a stage after its last checkpoint."""
    lanes: int = Field(default=128, ge=1)
    """Places of a corpus that are read side by side. With at least as many lanes as rows in a global batch, the rows of
    a batch come from different places. With exactly as many, each row continues in the same row of the next batch.
    Memory of the loader: for each corpus one or two blocks (usually of 1 MiB) a lane. A corpus of up to 256 MiB is kept
    whole."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the order of each corpus in every epoch."""
    bad_blocks: int = Field(default=0, ge=0)
    """Damaged blocks of each corpus that a run may skip, counted over all ranks. One more stops it, before the batch
    that needs it. Their bytes become padding and do not count in the loss; bytes after them keep their positions."""
    remote: RemoteConfig = RemoteConfig()

    @model_validator(mode="after")
    def _is_one_or_several(self) -> Self:
        if (self.shards is None) == (not self.mixture):
            raise ValueError("name either shards, a corpus, or mixture, several of them")
        if self.shards_sha256 is not None and self.mixture:
            raise ValueError("shards_sha256 is the digest of shards; a source of a mixture has its own shards_sha256")
        if self.stages and not self.mixture:
            raise ValueError("stages change the weights of a mixture, and there is none")
        return self

    @model_validator(mode="after")
    def _sources_can_be_named(self) -> Self:
        for name in self.mixture:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ValueError(f"{name!r} is no name of a source: letters, digits, _ and - can stand in one")
        return self

    @model_validator(mode="after")
    def _stages_follow_each_other(self) -> Self:
        if any(later.step <= earlier.step for earlier, later in pairwise(self.stages)):
            raise ValueError("stages are in the order of their steps, each at another step")
        for stage in self.stages:
            if unknown := sorted(stage.weights.keys() - self.mixture.keys()):
                raise ValueError(
                    f"the stage of step {stage.step} names {unknown[0]}, which is no source of the mixture"
                )
        for step, weights in self.weight_stages():
            if not any(weights.values()):
                raise ValueError(f"from step {step} on no source has a weight")
            if starved := left_out(weights):
                raise ValueError(f"from step {step} on {starved[0]} has so little weight that it would never be read")
        return self

    def sources(self) -> dict[str, SourceConfig]:
        """Return the corpora by name; a single corpus is named ONLY_SOURCE."""
        if self.shards is None:
            return self.mixture
        packing = PackingConfig.model_validate(self.model_dump(include=set(PackingConfig.model_fields)))
        return {ONLY_SOURCE: SourceConfig(shards=self.shards, shards_sha256=self.shards_sha256, **packing.model_dump())}

    def weight_stages(self) -> list[tuple[int, dict[str, float]]]:
        """Return the weights of every source, with the step from which they hold."""
        weights = {name: source.weight for name, source in self.sources().items()}
        stages = [(0, weights)]
        for stage in self.stages:
            weights = weights | stage.weights
            stages.append((stage.step, weights))
        return stages
