"""This machine as a place to start ranks, for the supervisor of a run in the background."""

import os
import platform
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from launchers.processes import STOPPED, RankProcesses, describe_exit, rank_command
from launchers.supervision.heartbeat import FOLDER
from launchers.supervision.plan import LaunchPlan, heartbeats_of, last_error, output_of
from launchers.supervision.record import Launch
from launchers.supervision.site import Ending


def is_running(last: Launch) -> bool:
    """Return whether the supervisor of a run is a process of this machine, by the run's last event."""
    is_here = not last.ends_background and not is_elsewhere(last)
    return is_here and last.job.isdecimal() and Path(f"/proc/{last.job}").exists()


def is_elsewhere(last: Launch) -> bool:
    """Return whether an event happened on another machine."""
    return bool(last.nodes) and platform.node() not in last.nodes


class Machine:
    """This machine. A signal to the supervisor stops the run, and it is not started again."""

    has_others = False

    def __init__(self) -> None:
        self.job = os.environ["SUBMITIT_LOCAL_JOB_ID"]
        self.nodes: Sequence[str] = [platform.node()]
        self._requests: list[signal.Signals] = []
        self._ranks: _MachineRanks | None = None
        for number in STOPPED.values():
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._requests.append(signal.Signals(number))
        if self._ranks is not None:
            self._ranks.processes.send(signal.Signals(number))

    def why_unusable(self) -> str:
        """Return an empty string: ranks can always run here."""
        return ""

    def start(self, plan: LaunchPlan, folder: Path, name: str) -> "_MachineRanks":
        """Start the ranks as processes of this machine."""
        self._ranks = _MachineRanks(plan, folder, name)
        return self._ranks

    def is_owned(self) -> bool:
        """Return whether nobody has asked the run to stop."""
        return not self._requests

    def why_stopped(self) -> str:
        """Return the only reason there is here."""
        return "asked by hand"

    def lost(self, nodes: Sequence[str]) -> list[str]:
        """Return no nodes: this one works."""
        return []

    def requeue(self, exclude: Sequence[str]) -> str:
        """Return why the job cannot be requeued."""
        return "this machine has no queue"


class _MachineRanks:
    """The ranks of one start. When one has failed, the others are killed."""

    def __init__(self, plan: LaunchPlan, folder: Path, name: str) -> None:
        self.size = plan.processes_per_node
        self._folder = folder
        heartbeats = heartbeats_of(folder, name)
        heartbeats.mkdir(parents=True)
        command = rank_command("launchers.rank", plan.entry, f"{folder}/config.yaml")
        self.processes = RankProcesses(command, self.size, {FOLDER: str(heartbeats)})
        for rank in range(self.size):
            with output_of(folder, rank).open("a") as output:
                self.processes.start_next(subprocess.DEVNULL, output, subprocess.STDOUT)

    def ending(self) -> Ending | None:
        """Return how the ranks ended; None while they run."""
        outcome = self.processes.outcome()
        if outcome is None:
            return None
        if outcome.kind == "finished":
            return Ending("finished", "")
        self.kill()
        rank, code = outcome.rank, outcome.code
        if outcome.kind == "stopped":
            return Ending("stopped", STOPPED[code].name)
        words = describe_exit(code) if code < 0 else f"exit code {code}"
        error = last_error(output_of(self._folder, rank)) if code > 0 else ""
        return Ending("failed", f"rank {rank}: {error or words}", platform.node(), rank)

    def ask_where(self) -> None:
        """Send SIGQUIT to all ranks."""
        self.processes.send(signal.SIGQUIT)

    def kill(self) -> None:
        """Kill all ranks."""
        self.processes.kill()
