"""Check the folders that a run writes to, and the space of its checkpoints."""

import os
import shutil
from pathlib import Path

from pretrain.checkpoint import CheckpointStore, locate
from pretrain.config.checks.findings import Check
from pretrain.estimate.states import MASTER, MOMENT
from pretrain.models import ByteModel
from pretrain.optim import OptimizerEntry
from pretrain.terminal.progress import size


def check_folders(check: Check) -> None:
    """Report whether the folders of the run can be written."""
    config = check.config
    _check_writable(check, "run.root", check.folder.path)
    home = config.checkpoint.home
    if home is not None and isinstance(place := locate(home), Path):
        _check_writable(check, "checkpoint.home", place)
    elif home is not None and check.home_is_known:
        check.add("ok", "checkpoint.home", f"{home} can be listed; whether it can be written is not known")
    if config.data.remote.cache is not None:
        _check_writable(check, "data.remote.cache", Path(config.data.remote.cache))


def _check_writable(check: Check, field: str, path: Path) -> None:
    """Report whether a folder can be written, or made if it does not exist."""
    there = _nearest_folder(path.absolute())
    if not there.is_dir():
        check.add("error", field, f"{there} is not a folder")
    elif not os.access(there, os.W_OK | os.X_OK):
        check.add("error", field, f"{there} cannot be written")
    else:
        check.add("ok", field, f"{path} can be {'written' if there == path.absolute() else 'made'}")


def check_disk(check: Check, model: ByteModel) -> None:
    """Report whether the checkpoints that are kept fit on the disk."""
    config, place = check.config.checkpoint, locate(check.folder.checkpoints_in(check.config.checkpoint.home))
    one = checkpoint_bytes(model, check.config.optimizer.entry, check.config.train.global_batch)
    saves = -(-check.config.train.steps // config.every)
    if not isinstance(place, Path):
        check.add("ok", "checkpoint.keep", f"{size(one)} a checkpoint; the free space of {place} is not known")
        return
    there = len(CheckpointStore(place, keep=None).committed())
    kept = saves if config.keep is None else config.keep + 1  # a new one is written before an old one is deleted
    kept += check.config.train.steps // config.keep_every if config.keep_every else 0
    most = min(kept, max(saves, 1))
    free = shutil.disk_usage(_nearest_folder(place.absolute())).free
    text = f"{most:,} checkpoints of {size(one)} at most, {size(free)} free"
    if max(most - there, 1) * one > free:
        check.add("error" if one > free else "warning", "checkpoint.keep", f"{text}: the disk would fill up")
    else:
        check.add("ok", "checkpoint.keep", text)


def checkpoint_bytes(model: ByteModel, optimizer: OptimizerEntry, global_batch: int) -> int:
    """Return the bytes of a checkpoint: masters, moments and the memory of each row, in fp32."""
    carried = sum(tensor[0].numel() for tensor in model.empty_memory(1).values())
    of_model = MASTER * model.parameter_count() + MOMENT * optimizer.count_moments(model)
    return of_model + MASTER * carried * global_batch


def _nearest_folder(path: Path) -> Path:
    """Return an absolute path, or the first of its parents that exists."""
    return next(place for place in (path, *path.parents) if os.path.lexists(place))
