"""Branches: new runs that continue a checkpoint of another run.

    checkpoint of the parent ─▶ its tensors and state, with a new id and the ancestry ─▶ first checkpoint of the branch

The branch is a run like any other: `train` and `submit` resume it from that checkpoint. Its parent is only read.
"""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from byteloom.core.progress import Progress, ignore
from byteloom.core.provenance import changes, source_file, source_text
from byteloom.core.storage.files import replace_file
from byteloom.core.storage.locations import locate
from data_pipeline.stream.byte_stream import ByteStream
from data_pipeline.stream.mixture import as_begun, fingerprint_of
from data_pipeline.stream.reading import Reading, open_streams
from data_pipeline.stream.record import Record
from pretrain.checkpoint import CheckpointError, Metadata
from pretrain.checkpoint.copies import checkpoint_of_step, copy_checkpoint
from pretrain.checkpoint.homes.home import committed, open_home
from pretrain.training.ancestry import ANCESTRY, Ancestor, ancestors_in
from pretrain.training.config import TrainingRecipe
from pretrain.training.home_owner import owner_of, take_home
from pretrain.training.lineage import LINEAGE, place_of, stored_lineage
from pretrain.training.run_folder import STARTED_IN, RunFolder, RunFolderError
from pretrain.training.starting.checks import finetune_changes, scaling_changes, stream_of_state
from pretrain.training.weights import model_changes, store_of

NEW_FOLDER = {".lock", "checkpoints"}
"""Entries of a run folder in which no run has begun: an interrupted `branch` leaves them."""


def find_branch_point(run: str, step: int) -> Metadata:
    """Return the checkpoint of a step of a run.

    Args:
        run: run folder, or the home of its checkpoints.
        step: of the checkpoint.

    Raises:
        CheckpointError: there is none, or its metadata is not valid.
    """
    place = locate(run)
    is_run = isinstance(place, Path) and (place / "run.json").exists()
    return checkpoint_of_step(store_of(place).folder, step, RunFolder(Path(run)).run_id() if is_run else None)


def make_branch(
    parent: Metadata, recipe: TrainingRecipe, source: Mapping[str, str], progress: Progress = ignore
) -> RunFolder:
    """Make the run folder and the first checkpoint of a branch.

    Args:
        parent: checkpoint that the branch continues.
        recipe: of the branch.
        source: tags of the recipe; see provenance.py.
        progress: called with bytes copied and bytes in all.

    Raises:
        CheckpointError: the recipe changes what a branch may not change, or the checkpoint cannot be copied.
        CorpusError: a corpus cannot be read, or the recipe contradicts what the parent has read.
        RunFolderError: a run of this name exists, or the folder cannot be written.
    """
    streams = _streams(parent, recipe)
    folder = RunFolder(Path(recipe.run.root) / recipe.run.name)
    place = folder.checkpoints_in(recipe.checkpoint.home)
    _refuse_used(folder, place)
    with folder.locked():
        _refuse_used(folder, place)
        home, run, state = open_home(place), uuid.uuid4().hex, parent.state
        ancestry = [each.model_dump(mode="json") for each in [*ancestors_in(state), _parent(parent, recipe)]]
        here = {STARTED_IN: str(Path.cwd())}
        own = {"run": run, "generation": 0, "config": recipe.as_tree(), ANCESTRY: ancestry, **here}
        own[LINEAGE] = stored_lineage(parent)
        home.sweep()
        copy_checkpoint(parent, home, {**state, **own}, lambda: take_home(recipe, folder, streams, run), progress)
        resolved = recipe.as_yaml()
        replace_file(folder.config, resolved)
        replace_file(source_file(folder.config), source_text(resolved, source))
        began = {"data": state["config"]["data"], "fingerprint": state["fingerprint"]}
        kept: dict[str, Any] = {name: state[name] for name in ("precision", "first_values") if name in state}
        model = recipe.as_tree()["model"]
        folder.write_identity({"id": run, "model": model, **began, **kept, ANCESTRY: ancestry, **here})
    return folder


def _parent(parent: Metadata, recipe: TrainingRecipe) -> Ancestor:
    """Return the entry of a branch's parent in the ancestry."""
    then = {section: value for section, value in parent.state["config"].items() if section not in ("run", "tracking")}
    now = {section: value for section, value in recipe.as_tree().items() if section in then}
    return Ancestor(
        run=parent.state["run"],
        name=parent.state["config"]["run"]["name"],
        step=parent.state["reading"]["step"],
        checkpoint=place_of(parent),
        changes=tuple(changes(then, now)),
    )


def _streams(parent: Metadata, recipe: TrainingRecipe) -> dict[str, ByteStream]:
    """Return the streams of a branch, after checks that its recipe continues the parent.

    Raises:
        CheckpointError, CorpusError: it does not.
    """
    state, step = parent.state, parent.state["reading"]["step"]
    if recipe.train.steps <= step:
        raise CheckpointError(
            f"train.steps ({recipe.train.steps}) must be more than {step}, the step of {parent.folder}"
        )
    then, now = state["config"]["optimizer"]["name"], recipe.optimizer.name
    if then != now:
        raise CheckpointError(
            f"a branch continues the moments of its parent, so optimizer.name must be {then}, not {now}"
        )
    if differences := model_changes(state["config"]["model"], recipe.model):
        raise CheckpointError(
            f"a branch computes the function of its parent, and this recipe changes it ({'; '.join(differences)}); a "
            f"new run with initialize.weights={parent.folder} may change it"
        )
    if differences := finetune_changes(state["config"], recipe.as_tree()):
        raise CheckpointError(
            f"a branch trains the parameters of its parent, and this recipe changes them ({'; '.join(differences)}); a "
            f"new run with initialize.weights={parent.folder} may change them"
        )
    if differences := scaling_changes(state["config"], recipe.as_tree()):
        raise CheckpointError(
            f"a branch has the scales of its parent, and this recipe changes them ({'; '.join(differences)}); a "
            f"new run with initialize.weights={parent.folder} may change them"
        )
    begun = stream_of_state(state)
    streams = as_begun(open_streams(recipe.data, recipe.model.sequence_length), *begun)
    try:
        if fingerprint_of(streams, begun.names) != begun.fingerprint:
            why = "; ".join(changes({"data": state["config"]["data"]}, {"data": recipe.as_tree()["data"]}))
            raise CheckpointError(
                f"a branch reads the bytes of its parent, and this recipe reads others "
                f"({why or 'the content of a corpus changed'}); new sources may be added by data.stages"
            )
        Reading(recipe.data, streams, Record.from_state(state["reading"]), recipe.train.global_batch)
    finally:
        for stream in streams.values():
            stream.corpus.close()
    return streams


def _refuse_used(folder: RunFolder, home: Path | str) -> None:
    """Raise RunFolderError if a run has begun in a folder, or has checkpoints in a home."""
    if folder.path.exists() and {path.name for path in folder.path.iterdir()} - NEW_FOLDER:
        raise RunFolderError(f"{folder.path} exists already; choose another --name")
    if owner := owner_of(home):
        raise RunFolderError(f"{home} belongs to run {owner}; choose another --name")
    if checkpoints := committed(open_home(home)):
        raise RunFolderError(f"{checkpoints[-1]} exists already; choose another --name")
