"""Refreshes of RUN/report.html during a run, where the recipe asks for them.

Another process writes the page with `byteloom report`. Training does not wait for it and does not import it.
"""

from collections.abc import Mapping

from pretrain.training.callbacks.base import Callback
from pretrain.training.callbacks.side_process import SideProcess
from pretrain.training.config import ReportConfig
from pretrain.training.run import TrainingRun

LAST_SECONDS = 30.0
"""Longest wait for the last page of a start."""
HURRIED_SECONDS = 5.0
"""The same, after a request to stop: a scheduler may end the job soon."""


class ReportCallback(Callback):
    """Writes the page every `report.every` steps on the first rank, and at the end of a start."""

    def __init__(self, config: ReportConfig) -> None:
        self._every = config.every
        self._writer = SideProcess("report.html was not written")

    def on_numbers(self, run: TrainingRun, numbers: Mapping[str, float]) -> None:
        """Begin to write the page, where the step is due. A page that is being written counts as this one."""
        if self._every is None or run.world.rank or run.step % self._every:
            return
        self._writer.take_result()
        if not self._writer.is_running:
            self._begin(run)

    def on_end(self, run: TrainingRun, status: str) -> None:
        """Write the last page of the start."""
        if self._every is None or run.world.rank or not run.fence.holds:
            return
        limit = HURRIED_SECONDS if run.stop.signal is not None else LAST_SECONDS
        if self._writer.wait(limit):
            self._writer.take_result()
            self._begin(run)
            self._writer.wait(limit)
            self._writer.take_result()

    def _begin(self, run: TrainingRun) -> None:
        self._writer.begin("report", str(run.folder.path), "--out", str(run.folder.report))
