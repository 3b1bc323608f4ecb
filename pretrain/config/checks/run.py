"""Check the run folder, its checkpoints, and the weights that a run starts from."""

from typing import Any

from byteloom.core.provenance import changes
from byteloom.core.storage.step_folders import step_of
from data_pipeline.stream.byte_stream import ByteStream
from data_pipeline.stream.mixture import as_begun
from pretrain.checkpoint import CheckpointStore, InvalidCheckpointError, Metadata, read_metadata
from pretrain.config.checks.findings import Check, Finding
from pretrain.models import ByteModel
from pretrain.training.home_owner import find_owner
from pretrain.training.starting.checks import check_resumes, check_same_run, stream_of_identity
from pretrain.training.weights import find_initial_weights


def newest_checkpoint(check: Check) -> Metadata | None:
    """Return the newest checkpoint whose metadata is valid; its tensors are not read."""
    store = CheckpointStore(check.folder.checkpoints_in(check.config.checkpoint.home), keep=None)
    for place in reversed(store.committed()):
        try:
            return read_metadata(place)
        except InvalidCheckpointError as error:
            check.add("warning", "run.name", f"{place} is not valid ({error}); a start would set it aside")
    return None


def stored_identity(check: Check) -> dict[str, Any] | None:
    """Return the identity of a run that has begun; None for a new run.

    Raises:
        StateFileError: run.json is damaged.
    """
    began = check.folder.stored_identity()
    return began if began is not None and check.folder.has_begun(began) else None


def check_run(
    check: Check, streams: dict[str, ByteStream] | None, began: dict[str, Any] | None, checkpoint: Metadata | None
) -> None:
    """Report whether a run of this name exists, and whether this recipe resumes it.

    Raises:
        CheckpointError: this recipe cannot resume the run.
    """
    if holder := check.folder.holder():
        check.add("error", "run.name", f"{holder} is training in {check.folder.path}")
    if streams is not None:
        if began is not None:
            streams = as_begun(streams, *stream_of_identity(began))
        if check.home_is_known:
            find_owner(check.config, check.folder, streams)
        if began is not None:
            check_same_run(check.folder.path, began, check.config, streams)
        if checkpoint is not None:
            check_resumes(checkpoint, check.config, streams)
    elif began is not None or checkpoint is not None:
        check.add("warning", "run.name", "its corpora are missing; whether this recipe resumes the run is not known")
    if check.home_is_known:
        _add_where_it_starts(check, checkpoint, is_new=began is None)


def _add_where_it_starts(check: Check, checkpoint: Metadata | None, *, is_new: bool) -> None:
    steps = check.config.train.steps
    if checkpoint is None:
        before = "a new run" if is_new else "the run has started before, and has no checkpoint"
        check.add("ok", "run.name", f"{before}; {check.folder.path} begins at step 1 of {steps:,}")
        return
    step = step_of(checkpoint.folder)
    if step >= steps:
        check.add("warning", "train.steps", f"{steps:,}, and the run is at step {step:,}: nothing is left to train")
    else:
        check.add("ok", "run.name", f"resumes after step {step:,} of {steps:,}, from {checkpoint.folder}")
    for change in changes(checkpoint.state["config"], check.config.as_tree()):
        name = change.partition(":")[0]
        check.findings.append(Finding("ok", name, f"changed since step {step:,}: {change}"))


def check_weights(check: Check, model: ByteModel, checkpoint: Metadata | None) -> None:
    """Report whether the weights that a new run starts from fit the model."""
    initialize, field = check.config.initialize, "initialize.weights"
    if initialize.weights is None:
        return
    if checkpoint is not None:
        check.add("ok", field, "not read, because the run has a checkpoint of its own")
        return
    with check.refusals(field):
        origin = find_initial_weights(initialize, check.config.model, model, check.config.optimizer.name)
        check.add("ok", field, f"{len(origin.tensors):,} tensors of {origin.checkpoint.folder}")
        for difference in origin.differences:
            check.add("warning", field, f"different from those weights: {difference}")
