"""A look into a few steps of a run with torch's profiler: by option, on each rank.

RUN/profile/rank-00000/
    step-00000010.json             Chrome trace, for https://ui.perfetto.dev
    step-00000010.txt              the operators that took longest, and most memory
    step-00000010.memory.pickle    on CUDA: allocations with their stacks, for https://pytorch.org/memory_viz
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import BaseModel, Field
from torch.profiler import ProfilerActivity, profile

from byteloom.core.step_folders import step_name
from byteloom.core.torch_compat import record_memory, save_memory

log = logging.getLogger(__name__)

TABLE_ROWS = 20


class ProfileConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Steps to look into with torch's profiler. What it finds is written to RUN/profile, a folder a rank."""

    start: int | None = Field(default=None, ge=1)
    """First step to look into; without one, none is. The first steps of a start warm up, and are no good for it."""
    steps: int = Field(default=3, ge=1)
    """How many. Each takes longer than others do, and writes a trace of some MB."""
    memory: bool = False
    """Record allocations too: by operator in the table, over time in the trace, and on CUDA in a snapshot with their
    stacks."""


class StepProfiler:
    """
    Args:
        folder: this rank's.
    """

    def __init__(self, config: ProfileConfig, folder: Path, device: torch.device) -> None:
        self._steps = range(config.start, config.start + config.steps) if config.start else range(0)
        self._memory = config.memory
        self._folder = folder
        self._device = device.type

    def announce(self, after: int, steps: int) -> None:
        """Says what a start that goes on after a step of a run of `steps` will look into."""
        ahead = range(max(self._steps.start, after + 1), min(self._steps.stop, steps + 1))
        if ahead:
            log.info("the profiler will record steps %d to %d in %s", ahead[0], ahead[-1], self._folder.parent)
            if self._memory and self._device != "cuda":
                log.info("memory snapshots need CUDA; here the traces and tables show allocations")
        elif self._steps:
            log.info("steps %d to %d are past, so the profiler does not record them", self._steps[0], self._steps[-1])

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around all that is done in a step. Of one that fails nothing is written."""
        if number not in self._steps:
            yield
            return
        snapshot = self._memory and self._device == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device == "cuda" else [])]
        if snapshot:
            record_memory(on=True)
        try:
            with profile(activities=activities, profile_memory=self._memory, acc_events=True) as recorded:
                yield
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / step_name(number)
            recorded.export_chrome_trace(f"{path}.json")
            Path(f"{path}.txt").write_text(self._tables(recorded), encoding="utf-8")
            if snapshot:
                save_memory(f"{path}.memory.pickle")
        finally:
            if snapshot:
                record_memory(on=False)

    def _tables(self, recorded: profile) -> str:
        orders = ["time_total", *(["memory_usage"] if self._memory else [])]
        operators = recorded.key_averages()
        return "\n".join(
            operators.table(sort_by=f"self_{self._device}_{order}", row_limit=TABLE_ROWS) for order in orders
        )
