"""Part waits: no operation of a step makes the host wait for the device, by torch's synchronization check.

The check sees every wait but the intended one, for an event: the numbers of the step, while the device updates.
"""

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from gpu_parts import ROOT, Row, Setting
from gpu_parts.models import FAMILIES, batch_of, engine_of, train
from pretrain.models import small_config

STEPS = 3


def rows(setting: Setting) -> Iterator[Row]:
    """Yield the waits of a step of each family, by the line of ours that waits."""
    sizes = {"micro_batch": 2, "micro_batches": 2}
    for name in FAMILIES:
        config = small_config(name)
        engine = engine_of(setting, config, **sizes)
        train(engine, config, range(STEPS), **sizes)  # the first steps allocate and compile
        batch = batch_of(config, seed=STEPS, **sizes)
        with _recorded_waits(setting) as found:
            engine.train_step(batch, step=STEPS, learning_rate=1e-4)
        for place, count in found.items():
            yield Row(f"{name}: wait in {place}", count, "times")
        detail = "none is allowed" if setting.is_cuda else "a CPU has no waits to find"
        yield Row(f"{name}: waits of a step", sum(found.values()), "times", detail, not found)


@contextmanager
def _recorded_waits(setting: Setting) -> Iterator[Counter[str]]:
    """Yield a counter of the places that wait for the device."""
    found: Counter[str] = Counter()

    def show(message: object, *_: object, **__: object) -> None:
        if "synchronizing CUDA operation" in str(message):
            found.update([_place()])

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        if setting.is_cuda:
            torch.cuda.set_sync_debug_mode("warn")  # "error" would name the first wait only
        try:
            yield found
        finally:
            if setting.is_cuda:
                torch.cuda.set_sync_debug_mode("default")


def _place() -> str:
    """Return the innermost line of the training code that is running."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ("pretrain", "data_pipeline"):
            return f"{path.relative_to(ROOT)}:{frame.lineno} {frame.name}"
    return "torch"
