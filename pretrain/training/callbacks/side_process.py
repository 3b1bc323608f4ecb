"""A Byteloom command that runs beside the training, which does not wait for it."""

import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import IO

from launchers.processes import describe_exit

log = logging.getLogger(__name__)


class SideProcess:
    """Runs one command at a time, and logs why one failed. The same reason is logged once.

    Args:
        failure: message of a failure, such as "report.html was not written".
    """

    def __init__(self, failure: str) -> None:
        self._failure = failure
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._reasons = set[str]()

    def begin(self, *arguments: str, environment: Mapping[str, str] | None = None) -> bool:
        """Start `byteloom` with arguments; return whether it was started.

        Args:
            *arguments: of the command.
            environment: variables that differ from this process's.
        """
        command = [sys.executable, "-P", "-m", "pretrain.cli.entry", *arguments]
        nowhere = subprocess.DEVNULL
        try:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the process has ended
            # A session of its own: Ctrl-C in a terminal is a request to the run, and must not cut the command short.
            self._process = subprocess.Popen(
                command,
                stdin=nowhere,
                stdout=nowhere,
                stderr=self._errors,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )
        except OSError as error:  # a full disk, or no memory for a process: training continues
            self._warn(str(error))
            return False
        return True

    @property
    def is_running(self) -> bool:
        """Whether the command runs."""
        return self._process is not None and self._process.poll() is None

    def take_result(self) -> bool:
        """Return whether the command has succeeded since the last call. Log why it failed, if it did."""
        if self._process is None or (code := self._process.poll()) is None:
            return False
        assert self._errors is not None
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if re.search(r"\w", line)]
        self._forget()
        if code:
            self._warn(lines[-1].removeprefix("error: ") if lines and code > 0 else f"its writer {describe_exit(code)}")
        return code == 0

    def wait(self, seconds: float) -> bool:
        """Wait for the command, and kill it after a time; return whether it ended by itself, or there was none."""
        if self._process is None:
            return True
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self._forget()
            self._warn(f"it took longer than {seconds:.0f} s")
            return False
        return True

    def _forget(self) -> None:
        """Close what belongs to a command that has ended."""
        assert self._errors is not None
        self._errors.close()
        self._process = None

    def _warn(self, why: str) -> None:
        if why not in self._reasons:
            self._reasons.add(why)
            log.warning("%s: %s", self._failure, why)
