"""Part speed: the largest model by micro-batch, eager and compiled; and one trace."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile

from gpu_parts import Row, Setting
from gpu_parts.models import LARGEST, batch_of, engine_of, recipe_model
from pretrain.engines import Engine
from pretrain.engines.peak import peak_flops
from pretrain.models import ModelConfig

MICRO_BATCHES = (1, 4, 8, 16)
LAST_BEGIN_SECONDS = 120
"""Time of the part after which no other micro-batch begins. A compiled model is compiled again for each."""


def rows(setting: Setting) -> Iterator[Row]:
    """Yield MFU and gaps for each micro-batch, and write a trace of the first."""
    config = recipe_model(setting, LARGEST)
    begin = time.perf_counter()
    for compiles in setting.pick((False, True), (False,)):
        engine = engine_of(setting, config, compile=compiles)
        for micro_batch in setting.pick(MICRO_BATCHES, MICRO_BATCHES[:1]):
            title = f"{LARGEST}, {'compiled' if compiles else 'eager'}, micro-batch {micro_batch}"
            if time.perf_counter() - begin > LAST_BEGIN_SECONDS:
                yield Row(title, None, "", "left out: the part has used its time")
                continue
            try:
                yield from step_rows(setting, title, config, engine, micro_batch)
                recording = record(setting, config, engine, micro_batch)
            except torch.OutOfMemoryError as error:
                yield Row(title, None, "", f"left out: {str(error).splitlines()[0]}")
                continue
            if setting.is_cuda:
                idle, kernels = gaps(recording)
                yield Row(f"{title}: device idle within a step", idle, "", f"{kernels:,} kernels")
            if not compiles and micro_batch == MICRO_BATCHES[0]:
                recording.export_chrome_trace(str(setting.folder / "trace.json"))
            setting.free_memory()
        del engine
        setting.free_memory()


def step_rows(setting: Setting, title: str, config: ModelConfig, engine: Engine, micro_batch: int) -> Iterator[Row]:
    """Yield the bytes a second and the MFU of steps of one micro-batch."""
    batch = batch_of(config, micro_batch=micro_batch)
    seconds = setting.seconds(lambda: engine.train_step(batch, step=0, learning_rate=1e-5), rounds=3, calls=2)
    length = config.sequence_length
    flops = 3 * micro_batch * engine.model.flops(length)
    peak, source = peak_flops(setting.device, engine.dtype)
    yield Row(f"{title}: step", seconds * 1e3, "ms", f"{micro_batch * length / seconds / 1e3:,.0f} kB/s")
    yield Row(f"{title}: MFU", flops / seconds / peak, "", f"{flops / 1e12:.3g} TFLOP a step; peak of {source}")
    if setting.is_cuda:
        yield Row(f"{title}: peak memory", torch.cuda.max_memory_allocated(setting.device) / 2**30, "GiB")


def record(setting: Setting, config: ModelConfig, engine: Engine, micro_batch: int) -> Any:
    """Return the recording of one step."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.is_cuda else [])]
    batch = batch_of(config, micro_batch=micro_batch)
    with profile(activities=activities) as recording:
        engine.train_step(batch, step=0, learning_rate=1e-5)
        setting.synchronize()
    return recording


def gaps(recording: Any) -> tuple[float, int]:
    """Return the share of the time from the first kernel to the last in which no kernel runs, and their number."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in recording.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    )
    busy, end = 0.0, spans[0][0]
    for begin, stop in spans:
        busy += max(stop - max(begin, end), 0)
        end = max(end, stop)
    return 1 - busy / (end - spans[0][0]), len(spans)
