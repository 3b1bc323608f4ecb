"""Recording of a few steps with torch's profiler, on each rank, where the recipe asks for it.

RUN/profile/rank-00000/
    step-00000010.json             Chrome trace, for https://ui.perfetto.dev
    step-00000010.txt              the operators that took longest, and most memory
    step-00000010.memory.pickle    on CUDA: allocations with their stacks, for https://pytorch.org/memory_viz
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from byteloom.core.storage.step_folders import step_name
from byteloom.core.torch_compat import record_memory, save_memory
from pretrain.training.callbacks.base import Callback
from pretrain.training.config import ProfileConfig
from pretrain.training.run import TrainingRun

log = logging.getLogger(__name__)

TABLE_ROWS = 20
"""Operators in a table."""


class ProfileCallback(Callback):
    """Records each step of a window, from the wait for its batch to its numbers. A step that fails leaves no file."""

    def __init__(self, config: ProfileConfig) -> None:
        self._steps = range(config.start, config.start + config.steps) if config.start else range(0)
        self._memory = config.memory
        self._is_announced = False
        self._recording: profile | None = None

    def before_step(self, run: TrainingRun) -> None:
        """Begin to record a step of the window."""
        if not self._is_announced:
            self._is_announced = True
            self._announce(run)
        if run.step + 1 not in self._steps or self._recording is not None:  # the first batch of the step was skipped
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if _is_on_cuda(run) else [])]
        if self._has_snapshot(run):
            record_memory(on=True)
        self._recording = profile(activities=activities, profile_memory=self._memory, acc_events=True)
        self._recording.start()

    def after_step(self, run: TrainingRun, numbers: Mapping[str, float]) -> None:
        """Write what was recorded."""
        if (recorded := self._recording) is None:
            return
        try:
            recorded.stop()
            self._recording = None
            folder = run.folder.profile_of(run.world.rank)
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / step_name(run.step)
            recorded.export_chrome_trace(f"{path}.json")
            Path(f"{path}.txt").write_text(self._tables(recorded, run.engine.device.type), encoding="utf-8")
            if self._has_snapshot(run):
                save_memory(f"{path}.memory.pickle")
        finally:
            if self._has_snapshot(run):
                record_memory(on=False)

    def on_end(self, run: TrainingRun, status: str) -> None:
        """Drop the recording of a step that did not end."""
        if self._recording is not None:
            self._recording.stop()
            if self._has_snapshot(run):
                record_memory(on=False)

    def _announce(self, run: TrainingRun) -> None:
        """Log which steps of the window are ahead."""
        ahead = range(max(self._steps.start, run.step + 1), min(self._steps.stop, run.recipe.train.steps + 1))
        if ahead:
            folder = run.folder.profile_of(run.world.rank).parent
            log.info("the profiler will record steps %d to %d in %s", ahead[0], ahead[-1], folder)
            if self._memory and not _is_on_cuda(run):
                log.info("memory snapshots need CUDA; here the traces and tables show allocations")
        elif self._steps:
            log.info("steps %d to %d are past, so the profiler does not record them", self._steps[0], self._steps[-1])

    def _has_snapshot(self, run: TrainingRun) -> bool:
        return self._memory and _is_on_cuda(run)

    def _tables(self, recorded: profile, device: str) -> str:
        """Return tables of operators by time, and by memory where that is recorded."""
        orders = ["time_total", *(["memory_usage"] if self._memory else [])]
        operators = recorded.key_averages()
        return "\n".join(operators.table(sort_by=f"self_{device}_{order}", row_limit=TABLE_ROWS) for order in orders)


def _is_on_cuda(run: TrainingRun) -> bool:
    return run.engine.device.type == "cuda"
