"""This machine, as the supervisor of a run in the background has it: ranks are processes of its own."""

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from launchers.local import STOPPED, StopOfRanks, free_port, rank_environment
from launchers.supervision.heartbeat import FOLDER
from launchers.supervision.record import Launch
from launchers.supervision.supervisor import Ending, Plan, heartbeats_of, last_error, output_of


def is_running(last: Launch) -> bool:
    """Whether the supervisor of a run in the background is a process of this machine, by the run's last event."""
    is_here = not last.ends_background and not is_elsewhere(last)
    return is_here and last.job.isdecimal() and Path(f"/proc/{last.job}").exists()


def is_elsewhere(last: Launch) -> bool:
    """Whether that event was of another machine."""
    return bool(last.nodes) and platform.node() not in last.nodes


class Machine:
    """Whoever signals the supervisor wants the run to stop, and it is not started again."""

    has_others = False

    def __init__(self) -> None:
        self.job = os.environ["SUBMITIT_LOCAL_JOB_ID"]
        self.nodes: Sequence[str] = [platform.node()]
        self._requests: list[signal.Signals] = []
        self._ranks: _Processes | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._requests.append(signal.Signals(number))
        if self._ranks is not None:
            self._ranks.send(signal.Signals(number))

    def unfit(self) -> str:
        return ""

    def start(self, plan: Plan, folder: Path, name: str) -> "_Processes":
        self._ranks = _Processes(plan, folder, name)
        return self._ranks

    def owned(self) -> bool:
        return not self._requests

    def why_stopped(self) -> str:
        return "asked by hand"

    def lost(self, nodes: Sequence[str]) -> list[str]:
        return []

    def requeue(self, exclude: Sequence[str]) -> str:
        return "this machine has no queue"


class _Processes:
    """One start of all ranks; when one has failed, the others are ended."""

    def __init__(self, plan: Plan, folder: Path, name: str) -> None:
        self.size = plan.processes_per_node
        self._folder = folder
        heartbeats = heartbeats_of(folder, name)
        heartbeats.mkdir(parents=True)
        port = free_port()
        self._ranks = []
        self._stop = StopOfRanks(self.send)
        for rank in range(self.size):
            with output_of(folder, rank).open("a") as output:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "launchers.rank", plan.entry, f"{folder}/config.yaml"],
                    env=rank_environment(rank, self.size, port) | {FOLDER: str(heartbeats)},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            self._ranks.append(process)

    def ending(self) -> Ending | None:
        codes = [process.poll() for process in self._ranks]
        if stopped := [code for code in codes if code in STOPPED]:
            if not self._stop.is_over(codes):
                return None
            self.kill()
            return Ending("stopped", STOPPED[max(stopped)].name)
        failed = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
        if failed:
            self.kill()
            rank = failed[0]
            code = codes[rank] or 0
            words = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            said = last_error(output_of(self._folder, rank)) if code > 0 else ""
            return Ending("failed", f"rank {rank}: {said or words}", platform.node(), rank)
        return None if None in codes else Ending("finished", "")

    def send(self, number: signal.Signals) -> None:
        for process in self._ranks:
            process.send_signal(number)

    def ask_where(self) -> None:
        self.send(signal.SIGQUIT)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        for process in self._ranks:
            process.wait()
