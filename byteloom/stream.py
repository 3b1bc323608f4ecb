"""The training data of a run, step by step.

recipe, or run with the record of what it has read ─▶ Reading ─▶ Stream ─▶ rows of any step
"""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from byteloom.overrides import as_overrides
from data_pipeline.stream.mixture import as_begun, fingerprint_of
from data_pipeline.stream.reading import Reading, open_streams
from data_pipeline.stream.record import Record
from data_pipeline.stream.rows import Ids
from pretrain.checkpoint import CheckpointError, Location, locate, read_metadata
from pretrain.config.loading import load, with_overrides
from pretrain.training.ancestry import Ancestor, ancestors_in
from pretrain.training.run_folder import STARTED_IN, RunFolder, as_started
from pretrain.training.starting.checks import stream_of_state
from pretrain.training.weights import is_checkpoint, store_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

NO_WARM_UP = {"schedule": {"warmup_steps": 0}}
"""Optimizer section that is valid for a run of any length."""


class Stream:
    """The rows that a run reads, for any step: those that it has read, and those that it will read.

    Rows are a function of the corpora, the recipe and the step. Damaged blocks and withdrawn documents that a run has
    skipped are padding. `stream[g]` is training sequence g: (sequence_length,) ids.

    Args:
        recipe: a run folder; or a recipe, by its name or its .yaml file.
        overrides: values by section: `data={"shards": "corpora/books/train"}`.

    Raises:
        ConfigError: the recipe is wrong.
        CheckpointError: the corpora of the run hold other bytes than it read.
        CorpusError: a corpus cannot be read.
    """

    def __init__(self, recipe: str | PathLike[str], **overrides: Any) -> None:
        given = as_overrides(overrides)
        folder = RunFolder(Path(recipe))
        if folder.config.exists() and store_of(folder.path).committed():
            self._reading = past_reading(str(folder.path), given, ahead=True).reading
        else:
            config = load(folder.config if folder.config.exists() else str(recipe), given)
            streams = open_streams(config.data, config.model.sequence_length)
            self._reading = Reading(config.data, streams, Record(), config.train.global_batch)
        for stream in self._reading.mixture.streams.values():
            stream.bad_blocks = 0

    @property
    def sequence_length(self) -> int:
        """Ids of a row."""
        return self._reading.mixture.sequence_length

    def __getitem__(self, sequence: int) -> Ids:
        """Return a training sequence by its number: (sequence_length,) ids."""
        return self._reading.mixture[sequence]

    def rows(self, step: int) -> Ids:
        """Return the rows of a step.

        Args:
            step: number of the step, counted from 1.

        Returns:
            (global_batch, sequence_length) int16: bytes 0 to 255, 256 between documents, 257 for padding.

        Raises:
            CorpusError: there is no such step, or a block cannot be read.
        """
        return self.read_groups([self.sequences(step)])[0]

    def sequences(self, step: int) -> "NDArray[np.int64]":
        """Return the numbers of the training sequences of a step: (global_batch,).

        Raises:
            CorpusError: there is no such step.
        """
        return self._reading.sequences_of(step)

    def read_groups(self, groups: "Sequence[NDArray[np.int64]]") -> list[Ids]:
        """Return groups of training sequences by their numbers, which is faster than one by one.

        Returns:
            (n, sequence_length) int16 of each group, as of `rows`.

        Raises:
            CorpusError: a block cannot be read.
        """
        return [rows.ids for rows in self._reading.mixture.read_groups(groups)]

    def tensor(self, step: int) -> "Tensor":
        """Return the rows of a step as a torch tensor of int64, on the CPU. See `rows`."""
        import torch  # noqa: PLC0415 - NumPy is enough for `rows`

        return torch.from_numpy(self.rows(step)).long()

    def close(self) -> None:
        """Close the corpora."""
        self._reading.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PastReading(NamedTuple):
    """The data that a run had read at a checkpoint."""

    checkpoint: Location
    reading: Reading
    ancestors: Sequence[Ancestor]


def past_reading(path: str, overrides: Sequence[str], *, ahead: bool = False) -> PastReading:
    """Open the corpora of a checkpoint, or of a run's newest checkpoint, without reading its tensors.

    Args:
        path: path or URL of the run or the checkpoint.
        overrides: new places of corpora.
        ahead: whether the reading also has what the run will read.

    Raises:
        CheckpointError: there is no checkpoint, its metadata is damaged, or the corpora hold other bytes.
    """
    place = locate(path)
    checkpoints = [place] if is_checkpoint(place) else store_of(place).committed()
    if not checkpoints:
        raise CheckpointError(f"{path} has no checkpoint; name a corpus, a checkpoint, or a run with a checkpoint")
    metadata = read_metadata(checkpoints[-1])
    stored = metadata.state["config"]
    # This version may refuse sections of an older recipe that do not matter here.
    tree = {name: stored[name] for name in ("run", "data", "model", "train")} | {"optimizer": NO_WARM_UP}
    if isinstance(place, Path):
        run = place.resolve().parents[1] if is_checkpoint(place) else place
        tree["data"] = as_started(stored, run, metadata.state.get(STARTED_IN))["data"]
    config = with_overrides(tree, overrides, str(metadata.folder))
    streams = as_begun(open_streams(config.data, config.model.sequence_length), *stream_of_state(metadata.state))
    if fingerprint_of(streams) != metadata.state["fingerprint"]:
        raise CheckpointError(
            f"the corpora of {metadata.folder} hold other bytes than it read; if they were moved, "
            "add their new place: data.shards=FOLDER, or data.mixture.NAME.shards=FOLDER"
        )
    record = Record.from_state(metadata.state["reading"])
    reading = Reading(config.data, streams, record, config.train.global_batch if ahead else None)
    return PastReading(metadata.folder, reading, ancestors_in(metadata.state))
