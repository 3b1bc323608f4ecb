"""Measured results of a checkpoint: of the run's journal, and of `byteloom eval`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from byteloom.core.storage.state_files import StateFileError, read_json
from pretrain.checkpoint import Metadata, Url
from pretrain.terminal.losses import BITS_PER_BYTE, is_loss, loss_at
from pretrain.tracking.journal import read_journal
from pretrain.training.run_folder import RunFolder


@dataclass(frozen=True)
class Result:
    """A measured result of a model."""

    dataset: str
    """Name of the corpus and of the way it was scored."""
    loss: float
    """Loss in the unit of its metric."""
    bytes: int | None = None
    """Scored bytes; None if they are not known."""
    mode: str | None = None
    """Mode, stride and beginning of the evaluation; None for a value of the run's journal."""
    metric: str = BITS_PER_BYTE
    """Name of the loss; see `pretrain/terminal/losses.py`."""


def run_of(model: str) -> RunFolder | None:
    """Return the run folder of a run, or of one of its checkpoints, by its path; None if it is neither."""
    path = Path(model).resolve()
    run = RunFolder(path.parent.parent)
    if path.parent != run.checkpoints_in(None):
        run = RunFolder(path)
    return run if (run.path / "run.json").exists() else None


def evaluations_of(run: RunFolder, checkpoint: Metadata) -> list[Result]:
    """Return what `byteloom eval` has stored about a checkpoint.

    Raises:
        StateFileError: a file cannot be read, or is damaged.
    """
    return [_result(path) for path in sorted((run.evaluations / checkpoint.name).glob("*/figures.json"))]


def _result(path: Path) -> Result:
    figures = read_json(path, dict[str, Any], "remove its folder; `byteloom eval` makes it again")
    if figures is None:
        raise StateFileError(f"{path} was removed while it was read")
    name = path.parent.name
    if "objective" in figures:
        metric = next(key for key in figures if is_loss(key))
        return Result(name, figures[metric], figures["bytes"], f"objective {figures['objective']['name']}", metric)
    total = figures["total"]
    mode = f"mode {figures['mode']}, stride {figures['stride']}, begin {figures['begin']}"
    return Result(name, total[BITS_PER_BYTE], total["bytes"], mode)


def logged_losses(checkpoint: Metadata) -> dict[str, float]:
    """Return the last losses that the run logged up to a checkpoint; none if the checkpoint is not in its run.

    They are those of a step's batch, train, and of the validation corpora, validation.
    """
    if isinstance(checkpoint.folder, Url) or "reading" not in checkpoint.state:
        return {}
    last: dict[str, float] = {}
    for record in read_journal(RunFolder(checkpoint.folder.parent.parent).metrics):
        if record["step"] <= checkpoint.state["reading"]["step"]:
            found = {place: loss_at(place, record) for place in ("train", "validation")}
            last |= {place: record[name] for place, name in found.items() if name is not None}
    return last
