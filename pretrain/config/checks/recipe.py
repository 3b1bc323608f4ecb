"""Check what can be known of a run before it trains, without writing anything.

    recipe ─▶ config ─▶ corpora ─▶ run folder and checkpoints ─▶ device, memory, disk, packages ─▶ findings

A fault does not end the check: what does not depend on it is still checked. The functions that refuse a start in
`byteloom train` refuse it here too.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from data_pipeline.stream.mixture import as_begun
from pretrain.config.checks.data import check_reading, check_validation, open_streams
from pretrain.config.checks.disk import check_disk, check_folders
from pretrain.config.checks.findings import Check, Finding
from pretrain.config.checks.machine import build_model, check_device, check_memory, check_packages, check_precision
from pretrain.config.checks.run import check_run, check_weights, newest_checkpoint, stored_identity
from pretrain.config.errors import ConfigError
from pretrain.config.loading import load
from pretrain.training.starting.checks import stream_of_state
from pretrain.training.weights.frozen_models import with_run_copy


def check_recipe(recipe: str | Path, overrides: Sequence[str]) -> list[Finding]:
    """Return the findings of a recipe: all its faults, or the state of everything that the run needs."""
    try:
        config = load(recipe, overrides)
    except ConfigError as error:
        return [Finding("error", fault.field, fault.text) for fault in error.faults]
    with ExitStack() as opened:
        model = with_run_copy(config.model, Path(config.run.root) / config.run.name)
        check = Check(config.model_copy(update={"model": model}), opened)
        check.add("ok", "", "the recipe is valid")
        check.findings += [Finding("warning", warning.field, warning.text) for warning in config.warnings()]
        _check_run(check)
        return check.findings


def _check_run(check: Check) -> None:
    streams = open_streams(check)
    checkpoint = began = None
    with check.refusals("checkpoint.home" if check.config.checkpoint.home else "run.name"):
        checkpoint = newest_checkpoint(check)
        check.home_is_known = True
    if streams is not None:
        if checkpoint is not None:
            streams = as_begun(streams, *stream_of_state(checkpoint.state))
        check_reading(check, streams, checkpoint)
    check_validation(check, streams)
    with check.refusals("run.name"):
        began = stored_identity(check)
        check_run(check, streams, began, checkpoint)
    check_folders(check)
    device = check_device(check)
    dtype = check_precision(check, device, began) if device is not None else None
    model = build_model(check)
    if model is not None:
        check_weights(check, model, checkpoint)
        check_disk(check, model)
        if device is not None and dtype is not None:
            check_memory(check, model, device, dtype)
    check_packages(check)
