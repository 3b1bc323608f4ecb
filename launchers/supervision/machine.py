"""This machine as a place to start ranks, for the supervisor of a run in the background."""

import os
import platform
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from launchers.processes import STOPPED, RankProcesses, describe_exit, rank_command
from launchers.supervision.causes import fault_of_exit
from launchers.supervision.heartbeat import FOLDER
from launchers.supervision.output import LOG_BYTES, last_error, output_of
from launchers.supervision.plan import LaunchPlan, heartbeats_of
from launchers.supervision.record import Launch
from launchers.supervision.site import Ending, Examination


def is_running(last: Launch) -> bool:
    """Return whether the supervisor of a run is a process of this machine, by the run's last event."""
    is_here = not last.ends_background and not is_elsewhere(last)
    return is_here and last.job.isdecimal() and _has_not_ended(int(last.job))


def _has_not_ended(process: int) -> bool:
    """Return whether a process of this machine runs. One that has ended stays as a zombie until it is waited for."""
    with suppress(OSError):
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return fields[0] not in ("Z", "X")
    return False


def is_elsewhere(last: Launch) -> bool:
    """Return whether an event happened on another machine."""
    return bool(last.nodes) and platform.node() not in last.nodes


class Machine:
    """This machine. A signal to the supervisor stops the run, and it is not started again."""

    has_others = False

    def __init__(self) -> None:
        self.job = os.environ["SUBMITIT_LOCAL_JOB_ID"]
        self.nodes: Sequence[str] = [platform.node()]
        self.spares: Sequence[str] = ()
        self._requests: list[signal.Signals] = []
        self._ranks: _MachineRanks | None = None
        for number in STOPPED.values():
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._requests.append(signal.Signals(number))
        if self._ranks is not None:
            self._ranks.processes.request_stop(signal.Signals(number))

    def seconds_left(self) -> float:
        """Return infinity: there is no time limit."""
        return float("inf")

    def examine(self) -> Examination:
        """Return that ranks can always run here."""
        return Examination()

    def leave(self, nodes: Sequence[str]) -> bool:
        """Return whether other nodes are meant: there is no spare here."""
        return not set(nodes) & set(self.nodes)

    def start(self, plan: LaunchPlan, folder: Path, name: str) -> "_MachineRanks":
        """Start the ranks as processes of this machine."""
        self._ranks = _MachineRanks(plan, folder, name)
        if self._requests:  # one that came before there were ranks
            self._ranks.processes.request_stop(self._requests[0])
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


@contextmanager
def _blocked_requests() -> Iterator[None]:
    """Block requests to stop within. A process that is started inherits this until its loop listens."""
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPED.values())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


class _MachineRanks:
    """The ranks of one start. When one has failed, the others are killed."""

    def __init__(self, plan: LaunchPlan, folder: Path, name: str) -> None:
        self.size = plan.processes_per_node
        self._folder = folder
        heartbeats = heartbeats_of(folder, name)
        heartbeats.mkdir(parents=True, exist_ok=True)
        command = rank_command("launchers.rank", plan.entry, f"{folder}/config.yaml")
        variables = {FOLDER: str(heartbeats), LOG_BYTES: str(plan.supervise.log_bytes)}
        self.processes = RankProcesses(command, self.size, variables)
        try:
            with _blocked_requests():
                for rank in range(self.size):
                    with output_of(folder, rank).open("a") as output:
                        self.processes.start_next(subprocess.DEVNULL, output, subprocess.STDOUT)
        except OSError:  # a full disk: the supervisor tries again
            self.kill()
            raise

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
        if 128 - code in STOPPED:  # a request that came before the rank could handle it
            return Ending("stopped", STOPPED[128 - code].name)
        if code < 0:
            return Ending("failed", f"rank {rank}: {describe_exit(code)}", platform.node(), rank, "node")
        error = last_error(output_of(self._folder, rank))
        fault = fault_of_exit(code, error)
        return Ending("failed", f"rank {rank}: {error or f'exit code {code}'}", platform.node(), rank, fault)

    def ask_where(self) -> None:
        """Send SIGQUIT to all ranks."""
        self.processes.send(signal.SIGQUIT)

    def kill(self) -> None:
        """Kill all ranks."""
        self.processes.kill()
