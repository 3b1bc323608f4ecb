"""Check the device, the memory and the packages that a run needs."""

import contextlib
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from byteloom.core.packages import missing
from data_pipeline.stream.dealing import deal
from pretrain.config.checks.disk import checkpoint_bytes
from pretrain.config.checks.findings import Check, Level
from pretrain.engines import (
    CheckpointingConfig,
    EngineError,
    check_ranks,
    choose_device,
    choose_precision,
    compute_dtype,
    remark_on_idle_ranks,
    remark_on_precision,
)
from pretrain.engines.blocks import check_float8
from pretrain.estimate.activations import measure_activations, on_meta
from pretrain.estimate.states import USABLE, states_on_rank
from pretrain.models import ByteModel
from pretrain.models.patching.frozen import FrozenModelError
from pretrain.models.scaling import ScalingError
from pretrain.optim.scaling import scale_model
from pretrain.terminal.progress import size

COMPILERS = ("c++", "g++", "clang++")
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def check_device(check: Check) -> torch.device | None:
    """Report the device of the run; return the device of its last rank on this machine."""
    engine, ranks = check.config.engine, check.config.launch.processes
    try:
        check_ranks(engine, ranks)
    except EngineError as error:
        # A launcher such as `byteloom submit` starts any number of ranks, whatever the recipe says.
        alone = ", or use a launcher that starts several" if ranks == 1 else ""
        check.add("warning" if ranks == 1 else "error", "engine.name", f"{error}{alone}")
    with check.refusals("engine.device"):
        device = choose_device(engine.device, ranks - 1)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine's CPU"
        check.add("ok", "engine.device", f"{name}, in {'one process' if ranks == 1 else f'{ranks} processes'}")
        if device.type == "cpu" and ranks > (cores := len(os.sched_getaffinity(0))):
            check.add("warning", "launch.processes", f"{ranks} processes share {cores} processors")
        train = check.config.train
        if remark := remark_on_idle_ranks(engine, train.global_batch, train.micro_batch, ranks):
            check.add("warning", "train.global_batch", remark)
        return device
    return None


def check_precision(check: Check, device: torch.device, began: dict[str, Any] | None) -> torch.dtype | None:
    """Report the precision of the passes; return their type, or None if the device does not support it."""
    asked, field = check.config.engine.precision, "engine.precision"
    with check.refusals(field):
        kept = check.folder.earlier_precision(began) if began else None
        precision = choose_precision(asked, device, kept) if asked == "auto" else asked
        if precision == "fp8":
            check_float8(device)
        if remark := remark_on_precision(precision, device):
            check.add("warning", field, remark)
        else:
            check.add("ok", field, precision if precision == asked else f"{asked}, which is {precision} for this run")
        return compute_dtype(precision)
    return None


def build_model(check: Check) -> ByteModel | None:
    """Return the model on the meta device, or None if it cannot be built."""
    try:
        config = check.config
        model = scale_model(on_meta(config.model, config.finetune), config.model, config.optimizer)
    except (RuntimeError, OverflowError) as error:  # sizes beyond what torch can count
        check.add("error", "model", f"it cannot be built: {str(error).partition(chr(10))[0]}")
        return None
    except ScalingError as error:
        check.add("error", "optimizer.base", str(error))
        return None
    except FrozenModelError as error:
        check.add("error", "model.patcher.model", str(error))
        return None
    check.add("ok", "model", f"{check.config.model.family}, {model.parameter_count():,} parameters")
    return model


def check_memory(check: Check, model: ByteModel, device: torch.device, dtype: torch.dtype) -> None:
    """Compare the memory that a step needs with that of the device and the host."""
    config, ranks, field = check.config, check.config.launch.processes, "train.micro_batch"
    rows = min(config.train.micro_batch, config.train.global_batch)
    checkpointing = config.engine.activation_checkpointing
    if checkpointing.mode == "budget":  # only the compiler knows what is kept
        checkpointing = CheckpointingConfig()
    with check.refusals("engine.activation_checkpointing"):
        measured = measure_activations(config.model, rows, dtype, checkpointing, config.engine.context, config.finetune)
        activations = measured.gathering if config.engine.entry.sharding.weights and ranks > 1 else measured.peak
        passes = len(deal(config.train.global_batch, rows, 0, max(ranks // config.engine.context, 1)))
        states = states_on_rank(config.engine, config.optimizer.entry, model, dtype, ranks, passes)
        offloaded = sum(states) - states.weights if config.engine.offload else 0
        own = sum(states) - offloaded + activations
        copied = checkpoint_bytes(model, config.optimizer.entry, config.train.global_batch)
        parts = f"a micro-batch of {rows:,}: {size(activations)} of activations, {size(sum(states))} of states"
        if device.type == "cuda":
            _compare(check, field, f"{parts}, on each GPU", own, torch.cuda.mem_get_info(device)[1])
            _compare(check, field, "states in the host's memory", ranks * offloaded + copied, _host_memory())
        else:
            each = f" in each of {ranks} processes" if ranks > 1 else ""
            whole = ranks * (own + offloaded) + copied
            _compare(check, field, f"{parts}{each}, {size(copied)} of a checkpoint's copy", whole, _host_memory())


def _compare(check: Check, field: str, text: str, needed: int, there: int) -> None:
    level: Level = "error" if needed > there else "warning" if needed > USABLE * there else "ok"
    remark = {"error": ", which is too much", "warning": ", which may be too much", "ok": ""}[level]
    check.add(level, field, f"{text}; about {size(needed)} of {size(there)}{remark}")


def _host_memory() -> int:
    """Return the bytes of memory of this machine, or the limit of its container."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or one without a limit: "max"
        limits.append(int(CONTAINER_LIMIT.read_text(encoding="ascii")))
    return min(limits)


def check_packages(check: Check) -> None:
    """Report packages that only some recipes need and that are missing."""
    config = check.config
    needed = []
    if config.engine.entry.package:
        needed.append(("engine.name", config.engine.entry.package))
    if config.engine.precision == "fp8":
        needed.append(("engine.precision", "torchao"))
    if config.tracking.enabled:
        needed.append(("tracking.enabled", "mlflow"))
    for field, package in needed:
        if importlib.util.find_spec(package) is None:
            check.add("error", field, str(missing(field, package, ImportError("it is not installed"))))
    if config.engine.compile and not any(map(shutil.which, COMPILERS)):
        check.add("error", "engine.compile", f"no C++ compiler is on the PATH: {', '.join(COMPILERS)}")
