"""Owner of a checkpoint home: the run whose checkpoints it holds. No other run reads or writes there.

    HOME/owner.json    id and folder of the run, made once, by its first start     (a home that a recipe names)
    RUN/run.json       id of the run                                               (the home in the run folder)

A start in a new run folder takes the id of the owner if its recipe says the same about the model, the optimizer, the
seed and the data: a run that moved to another machine. A start of any other run is refused before it writes anything.
"""

import json
import platform
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from byteloom.core.provenance import changes
from byteloom.core.storage.locations import Location, locate
from data_pipeline.stream.byte_stream import ByteStream
from data_pipeline.stream.mixture import fingerprint_of
from pretrain.checkpoint import CheckpointError, CheckpointStore
from pretrain.checkpoint.homes.fence import Fence, Note
from pretrain.checkpoint.identity import KNOWN_RUN, fault_of_run
from pretrain.models import FamilyError, model_config
from pretrain.models.initial import FIRST_VALUES, WHOLE_DRAWING
from pretrain.optim.config import OptimizerConfig
from pretrain.training.config import TrainingRecipe
from pretrain.training.run_folder import RunFolder
from pretrain.training.weights import model_changes

OWNER = "owner.json"
"""File of a home that names its owner."""


class _StoredOwner(BaseModel):
    """Content of owner.json."""

    run: str
    """Id of the run."""
    folder: str
    """Machine and run folder of its first start."""
    recipe: dict[str, Any]
    """Parts of the recipe that identify the run; see `_made_of`."""


class HomeOwner(NamedTuple):
    """Owner of a home, as JSON values."""

    run: str | None
    """Id of the run; None if the home is nobody's."""
    generation: int
    """Start that wrote the newest checkpoint; 0 if that is not known."""
    first_values: int
    """Version of the generator of first values that the newest checkpoint began with; the newest one without any."""


def find_owner(recipe: TrainingRecipe, folder: RunFolder, streams: Mapping[str, ByteStream]) -> HomeOwner:
    """Return the owner of a recipe's home, which is the run itself, or nobody. The first rank calls this.

    Args:
        recipe: of the start.
        folder: of the run; it need not exist.
        streams: streams that the start would read, by source.

    Raises:
        CheckpointError: the home belongs to another run.
        StateFileError: run.json cannot be read, or is damaged.
    """
    home = folder.checkpoints_in(recipe.checkpoint.home)
    identity = folder.stored_identity()
    own = None if identity is None else identity["id"]
    store = CheckpointStore(home, keep=None)
    note = _read(Note(locate(home) / OWNER))
    newest = next(store.states(), None)
    generation = 0 if newest is None else newest.get("generation", 0)
    version = FIRST_VALUES if newest is None else newest.get("first_values", WHOLE_DRAWING)
    owner = note.run if note is not None else None if newest is None else newest["run"]
    if owner is None or owner == own:
        return HomeOwner(own, generation, version)
    sources = None  # of the owner; a run may add others
    if newest is not None:
        there, sources = _made_of(newest["config"], newest["fingerprint"]), newest["reading"]["stages"][-1][2]
    else:
        there = {} if note is None else note.recipe
    differences = _differences(there, _made_of(recipe.as_tree(), fingerprint_of(streams, sources)))
    if own is None:
        if not differences:
            return HomeOwner(owner, generation, version)
    elif note is None and (_has_checkpoint_of(store, own) or not (differences or _are_reliable(store))):
        # A foreign checkpoint that the load quarantines, or those of an earlier version.
        return HomeOwner(own, generation, version)
    where = "" if note is None else f", which began in {note.folder}"
    why = f" ({'; '.join(differences)})" if differences else f", {own}"
    raise CheckpointError(
        f"{home} belongs to run {owner}{where}; this is another run{why}. Choose another run.name or checkpoint.home; "
        f"to begin with its weights, also set initialize.weights={home}; to continue it in {folder.path}, copy its "
        "run.json there"
    )


def take_home(recipe: TrainingRecipe, folder: RunFolder, streams: Mapping[str, ByteStream], run: str) -> None:
    """Note that a home which the recipe names belongs to a run. The first rank calls this, in its run folder.

    Args:
        recipe: of the start.
        folder: of the run.
        streams: streams of the start, by source.
        run: id of the run.

    Raises:
        CheckpointError: another run has taken it, it cannot be written, or its checkpoints are of another model.
    """
    home = folder.checkpoints_in(recipe.checkpoint.home)
    _refuse_other_model(CheckpointStore(home, keep=None), run, recipe)
    if recipe.checkpoint.home is None:
        return
    note = Note(locate(home) / OWNER)
    owner = _StoredOwner(
        run=run,
        folder=f"{platform.node()}:{folder.path.resolve()}",
        recipe=_made_of(recipe.as_tree(), fingerprint_of(streams)),
    )
    try:
        is_new = note.create(json.dumps(owner.model_dump(), indent=1))
    except OSError as error:
        raise CheckpointError(f"{note.place} cannot be written: {error.strerror or error}") from error
    if not is_new and (_read(note) or owner).run != run:  # another run was faster
        find_owner(recipe, folder, streams)


def owner_of(home: str | Location) -> str | None:
    """Return the id of the run that owns a home; None if no run has taken it.

    Raises:
        CheckpointError: its note cannot be read, or is damaged.
    """
    owner = _read(Note(locate(home) / OWNER))
    return None if owner is None else owner.run


def fence_of(folder: RunFolder, home: str | None) -> Fence:
    """Return the fence of a run, whose checkpoints are where `checkpoint.home` says."""
    place = locate(folder.checkpoints_in(home))
    return Fence(folder.generation, *([] if home is None else [place / "generation"]))


def _read(note: Note) -> _StoredOwner | None:
    try:
        text = note.read()
    except OSError as error:
        raise CheckpointError(f"{note.place} cannot be read: {error.strerror or error}") from error
    try:
        return None if text is None else _StoredOwner.model_validate_json(text)
    except ValidationError as error:
        raise CheckpointError(
            f"{note.place} is damaged; if no other run keeps its checkpoints there, remove it, and the next start "
            "writes it again"
        ) from error


def _refuse_other_model(store: CheckpointStore, run: str, recipe: TrainingRecipe) -> None:
    """Raise CheckpointError if no checkpoint of a run fits the recipe's model. If one fits, others are quarantined."""
    found = []
    for state in store.states():
        if fault_of_run(state, run) is None:
            found.append(model_changes(state["config"]["model"], recipe.model))
            if not found[-1]:
                return
    if found:
        raise CheckpointError(
            f"the checkpoints in {store.folder} are of another model ({'; '.join(found[0])}); restore the old model, "
            "or choose another run.name"
        )


def _has_checkpoint_of(store: CheckpointStore, run: str) -> bool:
    return any("run" in state and state["run"] == run for state in store.states())


def _are_reliable(store: CheckpointStore) -> bool:
    """Return whether the run id of each checkpoint is reliable."""
    return all(KNOWN_RUN in state for state in store.states())


def _made_of(tree: Mapping[str, Any], fingerprint: str) -> dict[str, Any]:
    """Return the parts of a recipe's tree that identify a run."""
    return {
        "model": tree["model"],
        "optimizer": tree["optimizer"],
        "train": {"seed": tree["train"]["seed"]},
        "data": fingerprint,
    }


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Return the differences between a home's recipe and another, a line each. New fields have their default."""
    try:
        complete = {
            **there,
            "model": model_config(there["model"]).model_dump(mode="json"),
            "optimizer": OptimizerConfig.model_validate(there["optimizer"]).model_dump(mode="json"),
        }
    except (ValidationError, FamilyError):  # of another version: then the trees are compared as they are
        complete = dict(there)
    return changes(complete, dict(here))
