"""Part waits: no operation of a step makes the host wait for the device, by torch's synchronization check.

An operation that waits raises an error, except in the functions that `common/waits.py` lists. The check does not see
waits for events, so it allows the numbers of a step by itself.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from common.waits import WAITS_BEFORE_UPDATE
from gpu_parts import ROOT, Row, Setting
from gpu_parts.models import FAMILIES, batch_of, engine_of, train
from pretrain.engines import Upcoming
from pretrain.models import small_config

STEPS = 3
CASES = [*((name, "adamw") for name in FAMILIES), *((FAMILIES[0], name) for name in WAITS_BEFORE_UPDATE)]
"""Families and optimizers."""


def rows(setting: Setting) -> Iterator[Row]:
    """Yield whether a step waits, by family and optimizer, and where."""
    sizes = {"micro_batch": 2, "micro_batches": 2}
    for name, optimizer in CASES:
        config = small_config(name)
        engine = engine_of(setting, config, optimizer=optimizer, **sizes)
        train(engine, config, range(STEPS), **sizes)  # the first steps allocate and compile
        allowed = WAITS_BEFORE_UPDATE.get(optimizer)
        if allowed is not None:
            _allow(setting, engine, allowed.partition(":")[2])
        batch, following = (batch_of(config, seed=STEPS + number, **sizes) for number in range(2))
        wait = ""
        try:
            with _checked(setting, "error"):
                engine.train_step(batch, step=STEPS, learning_rate=1e-4, look_ahead=partial(Upcoming, following))
        except RuntimeError as error:
            if "synchronizing CUDA operation" not in str(error):
                raise
            wait = f"waits in {_place(error.__traceback__)}"
        detail = wait or ("" if setting.is_cuda else "a CPU has no waits to find, ") + f"allowed: {allowed or 'none'}"
        yield Row(f"{name}, {optimizer}: step without a wait", None, "", detail, not wait)


@contextmanager
def _checked(setting: Setting, mode: str) -> Iterator[None]:
    """Set what torch does within where an operation waits for the device: default, warn or error."""
    if not setting.is_cuda:
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _allow(setting: Setting, engine: Any, name: str) -> None:
    """Let a method of an engine wait."""
    method = getattr(engine, name)

    def allowed(*arguments: Any) -> Any:
        with _checked(setting, "default"):
            return method(*arguments)

    setattr(engine, name, allowed)


def _place(trace: TracebackType | None) -> str:
    """Return the innermost line of the training code that raised."""
    for frame in reversed(traceback.extract_tb(trace)):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ("pretrain", "data_pipeline"):
            return f"{path.relative_to(ROOT)}:{frame.lineno} {frame.name}"
    return "torch"
