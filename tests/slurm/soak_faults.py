"""Faults that a soak brings on a submitted run, each by its name; soak.py chooses among them.

A fault returns when it is over: from then on, nothing but the run itself keeps the run from its next step. It waits for
facts, such as a state of Slurm, and never for a time in which something should have happened.
"""

import errno
import math
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launchers.slurm import calls, scheduler
from launchers.slurm.limits import UNUSABLE
from launchers.slurm.scheduler import JobPhase
from launchers.slurm.times import seconds_of
from launchers.supervision.heartbeat import read_beat
from launchers.supervision.plan import heartbeats_of
from launchers.supervision.record import Event, Launch, last_submission
from pretrain.training.run_status import status_of
from tests.s3 import FaultyS3
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.submitted import SubmittedRun

SOAK_PATIENCE = 900.0
"""Deadline in seconds of any wait: a loaded machine may need minutes for a start."""
RANKS, SOAK_NODES = 2, 4
"""Ranks of the run, one on each of its nodes, and nodes of the cluster."""
TIME_MINUTES, SIGNAL_SECONDS = 240, 45
"""Time limit of a start, and the time before it at which the ranks are asked to stop."""


@dataclass
class SoakTarget:
    """Run under test, and what surrounds it."""

    cluster: Cluster
    run: SubmittedRun
    disk: Path
    """File system of the run folder alone."""
    proxy: FaultyS3
    """Server of the checkpoints."""

    @property
    def nodes(self) -> Sequence[str]:
        """Nodes of the newest start."""
        return self.starts()[-1].nodes

    def events(self, event: Event, after: float = 0.0) -> list[Launch]:
        """Return the recorded events of a kind after a time."""
        return [launch for launch in self.run.launches() if launch.event == event and launch.time > after]

    def starts(self, after: float = 0.0) -> list[Launch]:
        """Return the starts of the ranks after a time."""
        return self.events("started", after)

    def restarted(self, at: float) -> None:
        """Wait for a start after a time."""
        self.wait(lambda: self.starts(at), "the ranks start again")

    def wait(self, condition: Callable[[], object], description: str) -> None:
        """Wait for a condition; fail at once if the run was given up."""

        def check() -> object:
            if found := condition():
                return found
            assert "gave_up" not in self.run.events(), (self.run.folder / "gave-up.md").read_text()
            return None

        try:
            wait_until(check, description, SOAK_PATIENCE)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.run.logs()}") from error

    def slurm(self, *command: object) -> str:
        """Return the output of a command of Slurm, which is repeated while Slurm does not answer."""
        done = calls.ask(*map(str, command), policy=calls.IN_JOB)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def job_field(self, name: str) -> str:
        """Return a field of the job, with its name in `scontrol show job`."""
        shown = self.slurm("scontrol", "--oneliner", "show", "job", self.run.job)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)[name]

    def phases(self) -> list[str]:
        """Return the phases of the ranks of the newest start that have a heartbeat."""
        folder, start = last_submission(self.run.folder), self.starts()[-1].restart
        assert folder is not None
        beats = [read_beat(heartbeats_of(folder, f"start-{start}"), rank) for rank in range(RANKS)]
        return [beat.phase for beat in beats if beat is not None]

    def wait_for_steps(self) -> None:
        """Wait until every rank takes steps: other phases may last longer without a heartbeat."""
        self.wait(lambda: self.phases() == ["step"] * RANKS, "all ranks take steps")

    def all_nodes(self) -> None:
        """Wait until Slurm can use every node."""

        def is_whole() -> bool:
            nodes = self.slurm("sinfo", "-h", "-N", "-p", "low", "-o", "%N %t").splitlines()
            return len(nodes) == SOAK_NODES and not any(UNUSABLE.search(line.split()[1]) for line in nodes)

        self.wait(is_whole, "all nodes are up")

    def pid_of(self, rank: int) -> int:
        """Return the process of a rank of the newest start."""
        found = self.cluster.processes(self.run.job, rank)
        assert found, f"rank {rank} of job {self.run.job} has no process"
        return found[0]


def kill_rank(target: SoakTarget, choice: random.Random) -> float:
    os.kill(target.pid_of(choice.randrange(RANKS)), signal.SIGKILL)
    return time.time()


def freeze_rank(target: SoakTarget, choice: random.Random) -> float:
    target.wait_for_steps()
    os.kill(target.pid_of(choice.randrange(RANKS)), signal.SIGSTOP)
    return time.time()


def freeze_all_ranks(target: SoakTarget, choice: random.Random) -> float:
    target.wait_for_steps()
    for rank in range(RANKS):
        os.kill(target.pid_of(rank), signal.SIGSTOP)
    return time.time()


def stop_during_imports(target: SoakTarget, choice: random.Random) -> float:
    """Kill a rank, and ask the next start to stop before its ranks can listen."""
    at = kill_rank(target, choice)
    target.restarted(at)
    target.wait(lambda: len(target.phases()) == RANKS, "the ranks are processes, which import")
    return ask_to_stop(target, choice)


def cancel_step(target: SoakTarget, choice: random.Random) -> float:
    """Cancel the step of the ranks; the job runs on."""
    steps = target.slurm("squeue", "--steps", f"--jobs={target.run.job}", "--noheader", "--format=%i %j").splitlines()
    [step] = [line.split()[0] for line in steps if line.split()[1].startswith("start-")]
    target.slurm("scancel", step)
    return time.time()


def hide_shard(target: SoakTarget, choice: random.Random) -> float:
    """Kill a rank while a shard of the corpus is missing, until the next start has missed it."""
    shard = choice.choice(sorted((target.run.cwd / "corpus/train").glob("*.tar")))
    hidden = shard.rename(shard.with_suffix(".hidden"))
    at = kill_rank(target, choice)
    target.wait(lambda: [each for each in target.events("failed", at) if each.fault == "data"], "the shard is missed")
    hidden.rename(shard)
    return time.time()


def preempt(target: SoakTarget, choice: random.Random) -> float:
    seconds = choice.randint(1, 10)
    wanted = ("-p", "high", f"-N{SOAK_NODES}", "--exclusive", "-o", "/dev/null", "--parsable")
    other = target.slurm("sbatch", *wanted, "--wrap", f"sleep {seconds}")
    target.wait(lambda: scheduler.job(other, calls.IN_JOB).phase is JobPhase.FINISHED, "the other job has run")
    return time.time()


def reach_time_limit(target: SoakTarget, choice: random.Random) -> float:
    """Lower the time limit, so that Slurm asks the ranks to stop in about a minute; raise it for the next start."""
    at, job = time.time(), target.run.job
    done = seconds_of(target.job_field("RunTime"))
    minutes = math.ceil((done + SIGNAL_SECONDS + 20) / 60)
    target.slurm("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    target.wait(lambda: target.events("requeued", at), "a stop")
    target.wait(
        lambda: scheduler.job(job, calls.IN_JOB).phase is JobPhase.REQUEUED or target.starts(at), "the job is requeued"
    )
    target.slurm("scontrol", "update", f"JobId={job}", f"TimeLimit={TIME_MINUTES}")
    return target.events("requeued", at)[-1].time


def requeue(target: SoakTarget, choice: random.Random) -> float:
    scheduler.requeue(target.run.job)
    return time.time()


def ask_to_stop(target: SoakTarget, choice: random.Random) -> float:
    target.slurm("scancel", f"--signal={choice.choice(('USR2', 'TERM', 'INT'))}", target.run.job)
    return time.time()


def suspend(target: SoakTarget, choice: random.Random) -> float:
    """Suspend the job, at times for longer than a step may take."""
    job, seconds = target.run.job, choice.choice((1, 10, 40))
    target.slurm("scontrol", "suspend", job)
    target.wait(lambda: scheduler.job(job, calls.IN_JOB).phase is JobPhase.SUSPENDED, "the job is suspended")
    assert status_of(target.run.folder).state == "suspended"
    time.sleep(seconds)
    target.slurm("scontrol", "resume", job)
    return time.time()


def restart_slurmctld(target: SoakTarget, choice: random.Random) -> float:
    target.cluster.stop_controller()
    time.sleep(choice.randint(0, 15))
    target.cluster.continue_controller()
    target.all_nodes()
    return time.time()


def restart_slurmctld_and_kill_rank(target: SoakTarget, choice: random.Random) -> float:
    """Kill a rank while slurmctld is down, so that the next start has to wait for it."""
    pid = target.pid_of(choice.randrange(RANKS))
    target.cluster.stop_controller()
    os.kill(pid, signal.SIGKILL)
    time.sleep(choice.randint(0, 15))
    target.cluster.continue_controller()
    return time.time()


def crash_node(target: SoakTarget, choice: random.Random) -> float:
    at, node = time.time(), choice.choice(target.nodes)
    target.cluster.crash(node)
    target.restarted(at)
    target.cluster.start_node(node)
    return at


def cut_off_node(target: SoakTarget, choice: random.Random) -> float:
    """Let Slurm lose a node whose ranks live on, until the next start has begun and for a while longer."""
    at, node = time.time(), choice.choice(target.nodes)
    target.cluster.kill_slurmd(node)
    target.restarted(at)
    time.sleep(choice.randint(0, 15))
    target.cluster.start_node(node)
    return at


def cut_network(target: SoakTarget, choice: random.Random) -> float:
    """Cut the network of a node until the next start has begun and for a while longer; its processes live on."""
    at, node = time.time(), choice.choice(target.nodes)
    target.cluster.cut(node)
    target.restarted(at)
    assert node not in target.nodes
    time.sleep(choice.randint(0, 15))
    target.cluster.mend(node)
    return at


def interrupt_network(target: SoakTarget, choice: random.Random) -> float:
    """Cut the network of a node for less time than Slurm waits for it."""
    node = choice.choice(target.nodes)
    target.cluster.cut(node)
    time.sleep(choice.randint(1, 5))
    target.cluster.mend(node)
    return time.time()


def drain_node(target: SoakTarget, choice: random.Random) -> float:
    """Drain a node of the run, and requeue the job, which gets others."""
    at, node = time.time(), choice.choice(target.nodes)
    target.slurm("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=soak")
    scheduler.requeue(target.run.job)
    target.restarted(at)
    assert node not in target.nodes
    assert not target.events("failed", at)  # the node was not lost
    target.slurm("scontrol", "update", f"NodeName={node}", "State=RESUME")
    return at


def fill_disk(target: SoakTarget, choice: random.Random) -> float:
    """Fill the file system of the run folder for a while."""
    filler = target.disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        free = os.statvfs(target.disk)
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize)
    with filler.open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
    time.sleep(choice.randint(1, 20))
    filler.unlink()
    return time.time()


def end_home(target: SoakTarget, choice: random.Random) -> float:
    """Let the server of the checkpoints answer nothing but errors, from a save or a load on and for a while."""
    before = target.proxy.injected.total()
    target.proxy.fault_of = lambda path, credentials: "busy"
    target.wait(lambda: target.proxy.injected.total() > before, "the server is asked")
    time.sleep(choice.randint(1, 40))
    target.proxy.fault_of = lambda path, credentials: None
    return time.time()


@dataclass(frozen=True)
class SoakFault:
    """Kind of fault."""

    bring: Callable[[SoakTarget, random.Random], float]
    """Function that brings the fault on a run, and returns the time at which it was over."""
    has_restart: bool
    """Whether the ranks always start again. Otherwise they may go on."""
    waits: tuple[str, ...] = ()
    """Times of `supervise` that pass after the fault by design: the limit of a phase, a pause."""


SOAK_FAULTS = {
    "a rank killed -9": SoakFault(kill_rank, True),
    "a rank stopped (SIGSTOP)": SoakFault(freeze_rank, True, ("step_seconds",)),
    "all ranks stopped (SIGSTOP)": SoakFault(freeze_all_ranks, True, ("step_seconds", "pause_seconds")),
    "a shard is missing, a rank killed -9": SoakFault(hide_shard, True, ("pause_seconds",)),
    "the step of the ranks cancelled": SoakFault(cancel_step, True),
    "preempted": SoakFault(preempt, True),
    "time limit": SoakFault(reach_time_limit, True),
    "`scontrol requeue`": SoakFault(requeue, True),
    "`scancel --signal`": SoakFault(ask_to_stop, True),
    "`scancel --signal` as the ranks start": SoakFault(stop_during_imports, True),
    "`scontrol suspend`": SoakFault(suspend, False),
    "slurmctld restarts": SoakFault(restart_slurmctld, False),
    "slurmctld restarts, a rank killed -9 meanwhile": SoakFault(restart_slurmctld_and_kill_rank, True),
    "a node crashes": SoakFault(crash_node, True),
    "a node cut off, its ranks live on": SoakFault(cut_off_node, True),
    "the network of a node cut, its ranks live on": SoakFault(cut_network, True),
    "the network of a node cut for seconds": SoakFault(interrupt_network, False),
    "a node drained, `scontrol requeue`": SoakFault(drain_node, True),
    "the disk of the run folder full": SoakFault(fill_disk, False),
    "the checkpoint home (S3) down": SoakFault(end_home, False),
}
