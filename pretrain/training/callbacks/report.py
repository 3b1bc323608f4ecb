"""Refreshes of RUN/report.html during a run, where the recipe asks for them.

Another process writes the page with `byteloom report`. Training does not wait for it and does not import it.
"""

import logging
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import IO

from pretrain.training.callbacks.base import Callback
from pretrain.training.config import ReportConfig
from pretrain.training.run import TrainingRun

log = logging.getLogger(__name__)

LAST_SECONDS = 30.0
"""Longest wait for the last page of a start."""
HURRIED_SECONDS = 5.0
"""The same, after a request to stop: a scheduler may end the job soon."""


class ReportCallback(Callback):
    """Writes the page every `report.every` steps on the first rank, and at the end of a start."""

    def __init__(self, config: ReportConfig) -> None:
        self._every = config.every
        self._writer: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._has_warned = False

    def on_numbers(self, run: TrainingRun, numbers: Mapping[str, float]) -> None:
        """Begin to write the page, where the step is due. A page that is being written counts as this one."""
        if self._every is None or run.world.rank or run.step % self._every:
            return
        if self._has_ended():
            self._begin(run)

    def on_end(self, run: TrainingRun, status: str) -> None:
        """Write the last page of the start."""
        if self._every is None or run.world.rank or not run.fence.holds:
            return
        limit = HURRIED_SECONDS if run.stop.signal is not None else LAST_SECONDS
        if self._ends_within(limit):
            self._begin(run)
            self._ends_within(limit)

    def _begin(self, run: TrainingRun) -> None:
        entry = [sys.executable, "-P", "-m", "pretrain.cli.entry"]
        command = [*entry, "report", str(run.folder.path), "--out", str(run.folder.report)]
        nowhere = subprocess.DEVNULL
        try:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the process has ended
            # A session of its own: Ctrl-C in a terminal is a request to the run, and must not cut the page short.
            self._writer = subprocess.Popen(
                command, stdin=nowhere, stdout=nowhere, stderr=self._errors, start_new_session=True
            )
        except OSError as error:  # a full disk, or no memory for a process: training continues without a page
            self._warn(str(error))

    def _ends_within(self, seconds: float) -> bool:
        """Return whether no page is being written after a time; end the process that is writing one."""
        if self._writer is None:
            return True
        try:
            self._writer.wait(seconds)
        except subprocess.TimeoutExpired:
            self._writer.kill()
            self._writer.wait()
            self._warn(f"it took longer than {seconds:.0f} s")
        return self._has_ended()

    def _has_ended(self) -> bool:
        """Return whether no page is being written; log why the last one failed."""
        if self._writer is None:
            return True
        if (code := self._writer.poll()) is None:
            return False
        assert self._errors is not None
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        self._errors.close()
        self._writer = None
        if code > 0:
            self._warn(lines[-1] if lines else f"its writer ended with exit code {code}")
        return True

    def _warn(self, why: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning("report.html was not written: %s", why)
