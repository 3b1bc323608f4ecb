"""Nodes of a Slurm job, for the supervisor on the first node. Ranks are tasks of `srun`, one step for each start."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launchers.processes import STOPPED, free_port, rank_command
from launchers.slurm import scheduler
from launchers.slurm.hosts import expand_hosts
from launchers.slurm.presets import load_cluster
from launchers.slurm.scheduler import JobPhase, SchedulerError
from launchers.supervision.heartbeat import FOLDER, read_beat
from launchers.supervision.plan import LaunchPlan, heartbeats_of, last_error, output_of
from launchers.supervision.site import Ending
from launchers.supervision.supervisor import TIME_LIMIT

PATIENCE_SECONDS = 5.0
"""Seconds between two calls of a Slurm that does not answer."""
EARLY_SECONDS = 90.0
"""Seconds by which Slurm may send the signal too early."""
EXCLUSION_SECONDS = 20.0
"""Deadline, in seconds, to exclude nodes from a requeued job."""


class Allocation:
    """Slurm job of this process: its nodes, as the supervisor uses them."""

    has_others = True

    def __init__(self, folder: Path, environment: Mapping[str, str] = os.environ) -> None:
        self._folder = folder
        """Folder of the submission."""
        array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
        self.job = f"{array}_{task}" if array else environment["SLURM_JOB_ID"]  # one id names all tasks otherwise
        self.nodes: Sequence[str] = expand_hosts(environment["SLURM_JOB_NODELIST"])
        self._signal_seconds = load_cluster(f"{folder}/cluster.yaml", {}).signal_seconds
        self._restart = int(environment.get("SLURM_RESTART_COUNT", 0))

    def why_unusable(self) -> str:
        """Return why ranks cannot run on these nodes; empty if they can."""
        if missing := [name for name in ("scontrol", "scancel", "squeue") if shutil.which(name) is None]:
            return (
                f"{self.nodes[0]} has no {missing[0]} in PATH, which the supervisor needs; add its folder to "
                "PATH in the preset's setup, or choose other nodes"
            )
        # A node that does not see the run folder would fail without a word, or train with another's code.
        plan, python = shlex.quote(f"{self._folder}/plan.json"), shlex.quote(sys.executable)
        look = f'test -e {plan} && test -x {python} || echo "$SLURMD_NODENAME"'
        done = subprocess.run(
            ["srun", f"--ntasks={len(self.nodes)}", "--ntasks-per-node=1", "--chdir=/", "sh", "-c", look],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["no reason is given"]
            return f"srun fails in this job: {said[-1]}"
        if blind := sorted(done.stdout.split()):
            return (
                f"{', '.join(blind)} cannot see {self._folder}, or {sys.executable}; put run.root and the environment "
                "on a file system that all nodes share"
            )
        return ""

    def start(self, plan: LaunchPlan, folder: Path, name: str) -> "SrunRanks":
        """Start all ranks."""
        return SrunRanks(self, plan, folder, name)

    def is_owned(self) -> bool:
        """Return whether Slurm still runs this start of the job. Wait while Slurm does not answer."""
        while True:
            try:
                told = scheduler.job(self.job)
                return told.phase is JobPhase.RUNNING and told.restarts == self._restart
            except SchedulerError:
                time.sleep(PATIENCE_SECONDS)

    def why_stopped(self) -> str:
        """Return why Slurm asked the ranks to stop."""
        asked = subprocess.run(
            ["scontrol", "--oneliner", "show", "job", self.job], capture_output=True, text=True, check=False
        ).stdout
        fields = dict(re.findall(r"(?:^| )([A-Za-z]+)=(\S*)", asked))
        if fields.get("PreemptTime", "None") != "None":
            return "preempted"
        if fields.get("JobState") in ("RUNNING", "COMPLETING"):
            left = _seconds(fields.get("TimeLimit", "")) - _seconds(fields.get("RunTime", ""))
            return TIME_LIMIT if left < self._signal_seconds + EARLY_SECONDS else "asked by hand"
        return f"Slurm says {fields.get('JobState', 'nothing')}"

    def lost(self, nodes: Sequence[str]) -> list[str]:
        """Return the nodes that Slurm calls down, failing or draining."""
        asked = subprocess.run(
            ["sinfo", "--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%N %t"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout
        return sorted({line.split()[0] for line in asked.splitlines() if re.search(r"down|\*|fail|drng", line)})

    def requeue(self, exclude: Sequence[str]) -> str:
        """Requeue the job without some nodes; return why Slurm refuses, or an empty text."""
        try:
            scheduler.requeue(self.job)
        except SchedulerError as error:
            if self.is_owned():
                return str(error)  # else it worked, and its process was ended with this job
        # Slurm is ending this process, and allows it some seconds.
        deadline = time.monotonic() + EXCLUSION_SECONDS
        while exclude and time.monotonic() < deadline:
            try:
                scheduler.exclude(self.job, exclude)
                break
            except SchedulerError:  # not in the queue yet
                time.sleep(0.2)
        return ""


class SrunRanks:
    """Start of all ranks as one step of `srun`."""

    def __init__(self, allocation: Allocation, plan: LaunchPlan, folder: Path, name: str) -> None:
        self._job, self._name = allocation.job, name
        self._outputs = folder
        nodes = len(allocation.nodes)
        self.size = nodes * plan.processes_per_node
        self._heartbeats = heartbeats_of(folder, name)
        self._heartbeats.mkdir(parents=True)
        self._said_path = self._heartbeats / "srun.log"
        with self._said_path.open("w") as said:
            self._srun = subprocess.Popen(
                srun_command(plan, folder, nodes, name),
                env={
                    **os.environ,
                    "MASTER_PORT": str(free_port()),
                    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(plan.cpus_per_process)),
                    FOLDER: str(self._heartbeats),
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
            )

    def ending(self) -> Ending | None:
        """Return how the ranks ended; None while they run."""
        code = self._srun.poll()
        if code is None:
            return None
        # srun exits with 0 also when Slurm has ended the job.
        beats = [read_beat(self._heartbeats, rank) for rank in range(self.size)]
        if code == 0 and all(beat is not None and beat.code == 0 for beat in beats):
            return Ending("finished", "")
        said = self._said_path.read_text(encoding="utf-8", errors="backslashreplace")
        # The rank that failed first; Slurm ended the others.
        first = re.search(r"^srun: error: (\S+): tasks? (\d+)[^:]*: (.+)", said, re.MULTILINE)
        if lost := re.search(r"^srun: error: Node failure on (\S+)", said, re.MULTILINE):
            return Ending("failed", f"lost {lost[1]}", lost[1])
        if first is None:
            lines = [line for line in said.splitlines() if "error" in line] or ["the ranks were ended from outside"]
            return Ending("failed", lines[0].removeprefix("srun: error: "))
        node, rank, words = first[1], int(first[2]), first[3]
        coded = re.fullmatch(r"Exited with exit code (\d+)", words)
        if coded and int(coded[1]) in STOPPED:
            return Ending("stopped", STOPPED[int(coded[1])].name, node, rank)
        last_words = last_error(output_of(self._outputs, rank)) if coded else ""
        return Ending("failed", f"rank {rank} on {node}: {last_words or words}", node, rank)

    def ask_where(self) -> None:
        """Make every rank write the stacks of its threads."""
        self._signal("QUIT")

    def kill(self) -> None:
        """Kill all ranks."""
        self._signal("KILL")

    def _signal(self, name: str) -> None:
        """Send a signal to all ranks. If Slurm does not answer, the supervisor calls this again."""
        asked = subprocess.run(
            ["squeue", "--steps", f"--jobs={self._job}", "--noheader", "--format=%i %j"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout
        for step in [words[0] for line in asked.splitlines() if (words := line.split())[1:] == [self._name]]:
            subprocess.run(["scancel", f"--signal={name}", step], stderr=subprocess.DEVNULL, check=False)


def srun_command(plan: LaunchPlan, folder: Path, nodes: int, name: str) -> list[str]:
    """Return the command that starts one task for each rank. Slurm ends all tasks when one fails."""
    ranks = nodes * plan.processes_per_node
    # Every rank sees its node's GPUs and takes the one of its local rank, so that they can copy to each other.
    gpus = [f"--gpus-per-node={plan.gpus_per_node}"] if plan.gpus_per_node else []
    return [
        "srun",
        f"--job-name={name}",
        f"--nodes={nodes}",
        f"--ntasks={ranks}",
        f"--ntasks-per-node={plan.processes_per_node}",
        f"--cpus-per-task={plan.cpus_per_process}",  # srun of Slurm 22.05 to 23.02 does not take it from sbatch
        *gpus,
        "--kill-on-bad-exit=1",
        "--unbuffered",
        f"--output={str(folder).replace('%', '%%')}/ranks/rank-%5t.log",
        "--open-mode=append",
        *rank_command("launchers.rank", plan.entry, f"{folder}/config.yaml"),
    ]


def _seconds(clock: str) -> float:
    """Return the seconds of Slurm's [days-]hours:minutes:seconds; infinity for UNLIMITED."""
    timed = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", clock)
    if timed is None:
        return float("inf")
    days, hours, minutes, seconds = (int(part or 0) for part in timed.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
