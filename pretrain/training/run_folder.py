"""The run folder, whose content explains the run.

ROOT/NAME/
    config.yaml        the resolved recipe of the last start
    config.source.json the recipe that a person named, and the commits of its repository and of Byteloom
    train.log          log of the first rank; train.rank-00001.log and so on, of the other ranks
    metrics.jsonl      one line a step
    run.json           the run's identity
    health.jsonl       bad batches and what was done about them; see health/events.py
    generation         number of starts of the run; see checkpoint/homes/fence.py
    mlflow.json        what MLflow has received; trackers/NAME.json, what another tracker has
    coverage.json      what an epoch reads of each source
    checkpoints/       step-00001200/, …, unless the recipe has another home for them
    entropy_model/     export of the model whose entropies make the patches, if the recipe has one
    profile/           rank-00000/, …, if the recipe asks for it
    evaluations/       step-00001200/NAME/figures.json and curves, of each `byteloom eval`
    samples/           step-00001200/samples.json, pictures and sounds, if the recipe asks for them
    report.html        page about the run, if the recipe asks for it

launchers/submission.py describes the files that `byteloom submit` adds.
"""

import json
import logging
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, RootModel, field_validator

from byteloom.core.errors import CorrectableError
from byteloom.core.storage.files import replace_file
from byteloom.core.storage.locations import LocationText, locate
from byteloom.core.storage.locks import LockHeldError, LockHolder, holder_of, lock_file
from byteloom.core.storage.state_files import StateFileError, read_json, read_yaml
from data_pipeline.stream.inspection.coverage import Coverage
from pretrain.training.ancestry import ANCESTRY, Ancestor

log = logging.getLogger(__name__)

STARTED_IN = "started_in"
"""Field of run.json and of checkpoints: absolute path of the working directory of the start."""
PATHS = (
    *("run.root", "checkpoint.home", "initialize.weights", "model.patcher.model", "samples.files.*"),
    *("data.shards", "data.mixture.*.shards", "data.remote.cache"),
    *("validation.shards", "validation.corpora.*", "validation.corpora.*.shards"),
)
"""Places in a recipe of paths or URLs; * is any name. A relative path leads from the folder of the start."""
NAME = "[A-Za-z0-9][A-Za-z0-9._-]*"
"""Pattern of a run's name."""
LOCK_SECONDS = 0.5
"""Seconds that a start waits for the folder, because a process that checks the lock holds it for a moment."""


class RunConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Name and place of a run."""

    root: LocationText = "runs"
    """Folder of all runs; the embedded MLflow store lies here too. A leading ~ is the home folder, here and in every
    field that holds a path."""
    name: str = Field(json_schema_extra={"pattern": f"^{NAME}$"})
    """The run's folder under the root. A start with the name of an existing run resumes that run."""

    @field_validator("name")
    @classmethod
    def _is_a_file_name(cls, name: str) -> str:
        if not re.fullmatch(NAME, name):
            raise ValueError("it must have only letters, digits, . _ and -, and begin with a letter or a digit")
        return name


class RunFolderError(CorrectableError):
    """The run folder cannot be used."""


class Rollback(BaseModel, frozen=True, use_attribute_docstrings=True):
    """A return of a run to an earlier checkpoint, by `byteloom checkpoint rollback`."""

    to_step: int
    """Step from which the next start resumes."""
    from_step: int
    """Step of the newest checkpoint that was set aside."""
    reason: str
    """Reason that a person gave."""
    time: float
    """Seconds since 1970."""
    generation: int
    """Generation that the rollback took; the next start has a later one."""

    def __str__(self) -> str:
        return f"rolled back from step {self.from_step} to step {self.to_step}: {self.reason}"


class _StoredRunIdentity(BaseModel, extra="allow"):
    """Content of run.json: what a run began as."""

    id: str
    """Identity by which trackers find the run."""
    model: dict[str, Any]
    data: dict[str, Any]
    fingerprint: str
    precision: str | None = None
    """Precision of the last start."""
    started_in: str | None = None
    """Absolute path of the working directory of the last start; not set by earlier versions."""
    first_values: int | None = None
    """Version of the generator of first values; not set for a run that began before it had a version."""
    ancestry: tuple[Ancestor, ...] = ()
    """Runs that this one continues, oldest first."""
    rollbacks: tuple[Rollback, ...] = ()
    """Rollbacks of the run, oldest first."""


class _StoredCoverage(RootModel[dict[str, Coverage]]):
    """Content of coverage.json."""


class _StoredTrain(BaseModel):
    steps: int


class _StoredCheckpoint(BaseModel):
    home: str | None = None


class _StoredEngine(BaseModel):
    precision: str = "auto"


class _StoredRun(BaseModel):
    root: str = "runs"


class StoredRecipe(BaseModel):
    """Fields of config.yaml that are read without the rest of it."""

    run: _StoredRun = _StoredRun()
    train: _StoredTrain
    engine: _StoredEngine = _StoredEngine()
    checkpoint: _StoredCheckpoint = _StoredCheckpoint()


def rollback_before(identity: Mapping[str, Any], generation: int) -> Rollback | None:
    """Return the rollback after which a start is the first; None if there was none.

    Args:
        identity: what run.json holds.
        generation: of the start.
    """
    rollbacks = [Rollback.model_validate(each) for each in identity.get("rollbacks", ())]
    return rollbacks[-1] if rollbacks and rollbacks[-1].generation == generation - 1 else None


def start_folder(run: Path | None, root: str, recorded: str | None = None) -> Path:
    """Return the folder in which a run was started, from which relative paths of its recipe lead.

    Args:
        run: the run folder; None: it is not known.
        root: value of `run.root` in its recipe. A relative one is the end of the path of the run's parent. For others,
            the folder was recorded.
        recorded: working directory that a checkpoint of the recipe has recorded; None: that of the run's last start.

    Returns:
        The working directory if nobody knows the folder: the run was moved, or an earlier version started it.
    """
    started = None if run is None else _above_root(run, root)
    if started is None:
        recorded = recorded or (None if run is None else _recorded_start(run))
        started = Path(recorded) if recorded and Path(recorded).is_dir() else Path.cwd()
    return Path() if started == Path.cwd() else started


def _above_root(run: Path, root: str) -> Path | None:
    """Return the folder from which a relative root leads to a run's parent; None if it does not."""
    parent, parts = run.resolve().parent, Path(os.path.normpath(root)).parts
    if Path(root).is_absolute() or ".." in parts or parent.parts[len(parent.parts) - len(parts) :] != parts:
        return None
    return parent.parents[len(parts) - 1] if parts else parent


def _recorded_start(run: Path) -> str | None:
    try:
        stored = RunFolder(run).stored_identity() or {}
    except StateFileError:  # commands that need run.json report it
        return None
    return stored.get(STARTED_IN)


def as_started(recipe: Mapping[str, Any], run: Path | None, recorded: str | None = None) -> dict[str, Any]:
    """Return the recipe of a run with its paths from the folder in which the run was started.

    Args:
        recipe: plain values; they are not changed. A path that leads to nothing from that folder is kept.
        run: as of `start_folder`.
        recorded: as of `start_folder`.
    """
    section, moved = recipe.get("run"), dict(recipe)  # of a file that may be damaged
    root = section.get("root") if isinstance(section, Mapping) else None
    folder = start_folder(run, root if isinstance(root, str) else "runs", recorded)
    if folder != Path():
        for place in PATHS:
            moved = _with_paths(moved, place.split("."), folder)
    return moved


def _with_paths(tree: Any, place: Sequence[str], folder: Path) -> Any:
    """Return a tree whose values at a place are paths from a folder; see `PATHS`."""
    if not place:
        return _from_folder(tree, folder) if isinstance(tree, str) else tree
    name, further = place[0], place[1:]
    if isinstance(tree, Mapping):
        chosen = tree.keys() if name == "*" else {name} & tree.keys()
        return {key: _with_paths(value, further, folder) if key in chosen else value for key, value in tree.items()}
    if isinstance(tree, list | tuple) and name == "*":
        return [_with_paths(value, further, folder) for value in tree]
    return tree


def _from_folder(text: str, folder: Path) -> str:
    """Return a path from a folder; the text itself if it is a URL, or if it leads to nothing from there."""
    place = locate(text)
    is_there = isinstance(place, Path) and not place.is_absolute() and (folder / text).exists()
    return str(folder / text) if is_there else text


def read_recipe(path: Path) -> StoredRecipe | None:
    """Return the main fields of a run's resolved recipe; None where there is no such file.

    Raises:
        StateFileError: the file cannot be read, or is damaged.
    """
    return read_yaml(path, StoredRecipe, "restore it, or start the run again with its recipe, which writes it")


class RunFolder:
    """Files of a run.

    Args:
        path: of the folder, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.generation = path / "generation"
        self.metrics = path / "metrics.jsonl"
        self.mlflow = path / "mlflow.json"
        self.health = path / "health.jsonl"
        self.evaluations = path / "evaluations"
        self.report = path / "report.html"
        self.samples = path / "samples"
        self.lock = path / ".lock"

    def write_coverage(self, coverage: Mapping[str, Coverage]) -> None:
        """Write the coverage of each source."""
        tree = {name: each.model_dump() for name, each in coverage.items()}
        replace_file(self.path / "coverage.json", json.dumps(tree, indent=1))

    def read_coverage(self) -> dict[str, Coverage]:
        """Return what an epoch reads of each source; nothing for a run that has not started.

        Raises:
            StateFileError: coverage.json cannot be read, or is damaged.
        """
        stored = read_json(self.path / "coverage.json", _StoredCoverage, "start the run again, which writes it")
        return {} if stored is None else stored.root

    def log_of(self, rank: int) -> Path:
        """Return the log of a rank."""
        return self.path / (f"train.rank-{rank:05d}.log" if rank else "train.log")

    def profile_of(self, rank: int) -> Path:
        """Return the folder of a rank's profiler."""
        return self.path / "profile" / f"rank-{rank:05d}"

    @property
    def home(self) -> str | None:
        """The value of `checkpoint.home` in the recipe of the last start, as a path from where the run was started.

        Raises:
            StateFileError: config.yaml cannot be read, or is damaged.
        """
        recipe = read_recipe(self.config)
        if recipe is None or recipe.checkpoint.home is None:
            return None
        return _from_folder(recipe.checkpoint.home, start_folder(self.path, recipe.run.root))

    @property
    def checkpoints(self) -> Path | str:
        """The folder or URL of the checkpoints, by the recipe of the last start.

        Raises:
            StateFileError: config.yaml cannot be read, or is damaged.
        """
        return self.checkpoints_in(self.home)

    def checkpoints_in(self, home: str | None) -> Path | str:
        """Return the folder or URL of the checkpoints for a value of `checkpoint.home`."""
        return self.path / "checkpoints" if home is None else f"{home.rstrip('/')}/{self.path.name}"

    @contextmanager
    def locked(self, take_over: bool = False) -> Iterator[None]:
        """Hold the folder for this process alone within; make it if it does not exist.

        Args:
            take_over: whether to take it from a process that a scheduler has lost; the fence keeps that process from
                writing.

        Raises:
            RunFolderError: another process holds it, or it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._cannot_write(error) from error
        with ExitStack() as stack:
            try:
                self._take_lock(stack, take_over)
            except LockHeldError as error:
                raise RunFolderError(f"{error.holder} is training in {self.path}; choose another run.name") from error
            except OSError as error:
                raise self._cannot_write(error) from error
            yield

    def _take_lock(self, stack: ExitStack, take_over: bool) -> None:
        try:
            stack.enter_context(lock_file(self.lock, seconds=LOCK_SECONDS))
        except LockHeldError:
            if not take_over:
                raise
            self.lock.unlink()
            stack.enter_context(lock_file(self.lock, seconds=LOCK_SECONDS))

    def _cannot_write(self, error: OSError) -> RunFolderError:
        return RunFolderError(f"cannot write to the run folder {self.path}: {error.strerror}")

    def holder(self) -> LockHolder | None:
        """Return the process that holds the folder; None if none does, as far as this machine can tell."""
        return holder_of(self.lock)

    def stored_identity(self) -> dict[str, Any] | None:
        """Return what run.json holds; None for a folder in which no run has begun.

        Raises:
            StateFileError: the file cannot be read, or is damaged.
        """
        advice = (
            "restore it from a copy, or remove it and start with the recipe in config.yaml beside it: the run then "
            "continues from its checkpoints"
        )
        stored = read_json(self.path / "run.json", _StoredRunIdentity, advice)
        return None if stored is None else stored.model_dump(mode="json", exclude_unset=True)

    def run_id(self) -> str | None:
        """Return the id of the run; None if run.json is missing or damaged, which is logged."""
        try:
            stored = self.stored_identity()
        except StateFileError as error:
            log.warning("%s", error)
            return None
        return None if stored is None else stored["id"]

    def identity(self, made_of: dict[str, Any], run_id: str | None, first_values: int) -> dict[str, Any]:
        """Return what the run was when its first number was written, with the id by which trackers find it again.

        Args:
            made_of: model, data and fingerprint of this start; stored unless the run has begun (see `has_begun`).
            run_id: id of a run that began in another folder; of no use if this folder has one. None is a new id.
            first_values: version of the generator of first values, if this folder has no run.

        Raises:
            StateFileError: run.json cannot be read, or is damaged.
        """
        stored = self.stored_identity()
        if stored is not None and (self.has_begun(stored) or made_of.items() <= stored.items()):
            return stored
        known = run_id if stored is None else stored["id"]
        identity = {"id": known or uuid.uuid4().hex, **made_of}
        if stored is None or "first_values" in stored:
            identity["first_values"] = first_values if stored is None else stored["first_values"]
        self.write_identity(identity)
        return identity

    def has_begun(self, stored: Mapping[str, Any]) -> bool:
        """Return whether a run has written numbers or continues another run, so that its identity no longer changes.

        Args:
            stored: what run.json holds.
        """
        return bool(stored.get(ANCESTRY)) or (self.metrics.exists() and self.metrics.stat().st_size > 0)

    def earlier_precision(self, identity: dict[str, Any]) -> str | None:
        """Return the precision of the run's last start; None if there was none, or if it had chosen none."""
        if "precision" in identity:
            return identity["precision"]
        try:
            recipe = read_recipe(self.config)  # an older version's
        except StateFileError as error:
            log.warning("%s; this start does so", error)
            return None
        return None if recipe is None or recipe.engine.precision == "auto" else recipe.engine.precision

    def write_identity(self, identity: Mapping[str, Any]) -> None:
        """Write run.json."""
        replace_file(self.path / "run.json", json.dumps(identity, indent=1))
