"""Nodes of a Slurm job, for the supervisor on the first node. Ranks are tasks of `srun`, one step for each start."""

import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from byteloom.core.faults import DATA_EXIT_CODE, DISK_ERRNOS
from launchers.checks.node import longest_seconds
from launchers.checks.report import (
    REPORT_MARK,
    CheckRequest,
    NodeFault,
    NodeReport,
    faults_of_nodes,
    parse_reports,
    shared_fault,
)
from launchers.processes import STOPPED, free_port, rank_command
from launchers.slurm import calls, scheduler
from launchers.slurm.calls import SchedulerError
from launchers.slurm.hosts import expand_hosts
from launchers.slurm.presets import load_cluster
from launchers.slurm.scheduler import JobPhase
from launchers.slurm.steps import environment_beside_ranks, has_dead_steps, options_beside_ranks, steps_of
from launchers.slurm.times import seconds_of
from launchers.supervision.causes import STORAGE_EXIT_CODES, fault_of_exit
from launchers.supervision.heartbeat import FOLDER, read_beat
from launchers.supervision.output import LOG_BYTES, last_error, output_of
from launchers.supervision.plan import LaunchPlan, heartbeats_of
from launchers.supervision.site import Ending, Examination
from launchers.supervision.supervisor import TIME_LIMIT

PATIENCE_SECONDS = 5.0
"""Seconds between two calls of a Slurm that does not answer."""
FIRST_STEP_SECONDS = 300.0
"""Seconds that the first step may take, which looks at the run folder from each node, without the preset's checks."""
SILENCE_SECONDS = 60.0
"""Time that the check of a node may take longer than that of another, without the preset's checks."""
FIELD = re.compile(r"(?:^| )([A-Za-z]+)=(\S*)")
"""Pattern of a field of `scontrol show job`."""
STOP_WORDS = {signal.strsignal(number): number for number in STOPPED.values()}
"""Words of srun about a rank that a request to stop has killed, and the signal of the request."""
EARLY_SECONDS = 90.0
"""Seconds by which Slurm may send the signal too early."""
EXCLUSION_SECONDS = 20.0
"""Deadline, in seconds, to exclude nodes from a requeued job."""
CHECK = "check"
"""Name of the steps that check the nodes."""
OTHERS_SECONDS = 1.0
"""Time that the other ranks have to end after a signal has killed one. Slurm gives them its KillWait, often 30 s."""
ENDED_RANKS = re.compile(r"^srun: error: (\S+): tasks? (\d+)[^:]*: (.+)", re.MULTILINE)
"""Pattern of the lines of srun about ranks that have failed: the node, the first rank, and how it ended."""


log = logging.getLogger(__name__)


class Allocation:
    """Slurm job of this process: its nodes, as the supervisor uses them."""

    has_others = True

    def __init__(self, folder: Path, environment: Mapping[str, str] = os.environ) -> None:
        self._folder = folder
        """Folder of the submission."""
        array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
        self.job = f"{array}_{task}" if array else environment["SLURM_JOB_ID"]  # one id names all tasks otherwise
        self._cluster = load_cluster(f"{folder}/cluster.yaml", {})
        allocated = expand_hosts(environment["SLURM_JOB_NODELIST"])
        size = len(allocated) - self._cluster.spares
        self.nodes: Sequence[str] = allocated[:size]
        self.spares: Sequence[str] = allocated[size:]
        self._first = allocated[0]
        """Node of this process."""
        self._allocated = len(allocated)
        """Number of nodes of the job."""
        self._has_started = False
        """True after this process has started ranks."""
        self._shares_processors = False
        """True if the next step may use processors that Slurm lists as busy."""
        self._guard: subprocess.Popen[bytes] | None = None
        self._restart = int(environment.get("SLURM_RESTART_COUNT", 0))

    def examine(self) -> Examination:
        """Let each node check itself; return what is wrong.

        Raises:
            OSError: no node can write to the run folder.
        """
        if missing := [name for name in ("scontrol", "scancel", "squeue") if shutil.which(name) is None]:
            return Examination(
                f"{self._first} has no {missing[0]} in PATH, which the supervisor needs; add its folder to "
                "PATH in the preset's setup, or choose other nodes"
            )
        gone = self._gone()
        nodes, began = [node for node in (*self.nodes, *self.spares) if node not in gone], time.time()
        try:
            self._shares_processors = self._has_started and has_dead_steps(self.job, nodes, is_step)
            reports = self._reports(nodes)
            if len(reports) < len(nodes):  # srun ends all tasks if it cannot start one of them
                reports |= self._reports(nodes)
        except SchedulerError as error:
            return Examination(f"srun fails in this job: {error}")
        check_clocks = "clock" not in self._cluster.unchecked
        found = examination_of(nodes, faults_of_nodes(nodes, reports, began, time.time(), check_clocks=check_clocks))
        return Examination(found.problem, dict(found.faults) | dict.fromkeys(gone, "Slurm has lost it"))

    def _gone(self) -> list[str]:
        """Return the nodes that Slurm has taken from the job. It ends a job without spares instead."""
        if not self._cluster.spares or not (left := self._fields().get("NodeList")):
            return []
        return [node for node in (*self.nodes, *self.spares) if node not in expand_hosts(left)]

    def _start_guard(self) -> None:
        """Start the guard of a job with spares, if none runs; see guard.py."""
        others = [node for node in (*self.spares, *self.nodes) if node != self._first]
        if not self._cluster.spares or not others or (self._guard is not None and self._guard.poll() is None):
            return
        with Path(f"{self._folder}/guard.log").open("ab") as log_file:
            self._guard = subprocess.Popen(
                [
                    *("srun", "--job-name=guard", *options_beside_ranks(others[:1])),
                    *(sys.executable, "-P", "-m", "launchers.slurm.guard", self.job),
                ],
                env=environment_beside_ranks(),
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
            )

    def _reports(self, nodes: Sequence[str]) -> dict[str, NodeReport]:
        """Run the check on each node, as one step; return the reports of the nodes that answer."""
        cluster = self._cluster
        request = CheckRequest(
            str(self._folder),
            cluster.ranks_per_node,
            cluster.memory_bytes,
            cluster.gpus,
            cluster.check,
            cluster.unchecked,
        )
        plan, python = shlex.quote(f"{self._folder}/plan.json"), shlex.quote(sys.executable)
        # A node that does not see the run folder would fail without a word, or train with another's code.
        look = (
            f"test -e {plan} && test -x {python} || {{ "
            f"""echo '{REPORT_MARK}{{"node":"'"$SLURMD_NODENAME"'"}}'; exit; }}; """
            f"exec {python} -P -m launchers.checks.node {shlex.quote(json.dumps(asdict(request)))}"
        )
        seconds = longest_seconds(request)
        done = calls.ask(
            "srun",
            f"--job-name={CHECK}",
            f"--nodes={len(nodes)}",
            *self.chosen(nodes),
            f"--ntasks={len(nodes)}",
            "--ntasks-per-node=1",
            "--chdir=/",
            "--export=ALL",
            f"--wait={SILENCE_SECONDS + seconds:.0f}",
            *gpu_options(cluster.gpus_per_node),
            *("sh", "-c", look),
            policy=calls.IN_JOB,
            seconds=FIRST_STEP_SECONDS + seconds,
            environment=calls.step_environment(),
            passing=(calls.ANY_WORDS,),
            answer=REPORT_MARK,
        )
        if done.returncode:
            log.warning("the check of the nodes: %s", done.stderr.strip())
        blind = (
            f"cannot see {self._folder}, or {sys.executable}; put run.root and the environment on a file system that "
            "all nodes share"
        )
        return parse_reports(done.stdout, NodeFault("folder", blind))

    def chosen(self, nodes: Sequence[str]) -> list[str]:
        """Return options of `srun` that choose nodes and processors of the job; none if they are all of them."""
        shared = ["--overlap"] if self._shares_processors else []
        return [*shared, *([f"--nodelist={','.join(nodes)}"] if len(nodes) < self._allocated else [])]

    def leave(self, nodes: Sequence[str]) -> bool:
        """Use spares instead of some nodes from the next start on; return whether there are enough."""
        left = [node for node in (*self.nodes, *self.spares) if node not in nodes]
        size = len(self.nodes)
        if len(left) < size:
            return False
        self.nodes, self.spares = left[:size], left[size:]
        return True

    def start(self, plan: LaunchPlan, folder: Path, name: str) -> "SrunRanks":
        """Start all ranks."""
        self._has_started = True
        self._start_guard()
        return SrunRanks(self, plan, folder, name)

    def is_owned(self) -> bool:
        """Return whether Slurm still runs this start of the job. Wait while Slurm does not answer."""
        while True:
            try:
                told = scheduler.job(self.job, calls.IN_JOB)
                is_running = told.phase in (JobPhase.RUNNING, JobPhase.SUSPENDED)
                return is_running and told.restarts == self._restart
            except SchedulerError:
                time.sleep(PATIENCE_SECONDS)

    def why_stopped(self) -> str:
        """Return why Slurm asked the ranks to stop."""
        fields = self._fields()
        if fields.get("PreemptTime", "None") != "None":
            return "preempted"
        if int(fields.get("Restarts", 0)) > self._restart:
            return "an administrator requeued the job"
        if fields.get("JobState") in ("RUNNING", "COMPLETING"):
            return TIME_LIMIT if self._until_signal(fields) < 0 else "asked by hand"
        return f"Slurm says {fields.get('JobState', 'nothing')}"

    def seconds_left(self) -> float:
        """Return the seconds until Slurm may send the signal before the time limit."""
        return self._until_signal(self._fields())

    def _until_signal(self, fields: Mapping[str, str]) -> float:
        left = seconds_of(fields.get("TimeLimit", "")) - seconds_of(fields.get("RunTime", "00:00:00"))
        return left - self._cluster.signal_seconds - EARLY_SECONDS

    def _fields(self) -> dict[str, str]:
        """Return what Slurm says about the job; nothing if it does not answer."""
        return dict(FIELD.findall(calls.look("scontrol", "--oneliner", "show", "job", self.job)))

    def lost(self, nodes: Sequence[str]) -> list[str]:
        """Return the nodes that Slurm calls down or failing. A node that is being drained still works."""
        asked = calls.look("sinfo", "--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%N %t")
        states = [line.split() for line in asked.splitlines()]
        return sorted({node for node, state in states if re.search(r"down|\*|fail", state)})

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


def examination_of(nodes: Sequence[str], faults: Mapping[str, Sequence[NodeFault]]) -> Examination:
    """Return the result of a check. A fault that all nodes share is none of theirs.

    Args:
        nodes: nodes that were checked.
        faults: what is wrong with each of them, without nodes that are fine.

    Raises:
        OSError: no node can write to the run folder, because its storage fails.
    """
    shared = shared_fault(nodes, faults)
    if shared is not None and shared.check == "writable" and shared.number in DISK_ERRNOS:
        raise OSError(shared.number, f"no node can write to the run folder: {shared.words}")
    if shared is not None and shared.check == "folder":
        return Examination(f"{', '.join(sorted(faults))} {shared.words}")
    if shared is not None and len(nodes) > 1:
        return Examination(f"all nodes fail the same check, so it is not theirs; {shared}")
    return Examination(faults={node: "; ".join(map(str, each)) for node, each in faults.items()})


class SrunRanks:
    """Start of all ranks as one step of `srun`."""

    def __init__(self, allocation: Allocation, plan: LaunchPlan, folder: Path, name: str) -> None:
        self._job, self._name = allocation.job, name
        self._outputs = folder
        nodes = len(allocation.nodes)
        self.size = nodes * plan.processes_per_node
        self._heartbeats = heartbeats_of(folder, name)
        self._heartbeats.mkdir(parents=True, exist_ok=True)
        # On the node's own disk: when the run folder's is full, srun's words say so.
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115
        self._srun = subprocess.Popen(
            srun_command(plan, folder, nodes, name, allocation.chosen(allocation.nodes)),
            env={
                **calls.step_environment(),
                "MASTER_PORT": str(free_port()),
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(plan.cpus_per_process)),
                FOLDER: str(self._heartbeats),
                LOG_BYTES: str(plan.supervise.log_bytes),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._printed,
        )
        self._killed_at: float | None = None
        """Time at which srun was seen to say that a signal has killed a rank."""

    def ending(self) -> Ending | None:
        """Return how the ranks ended; None while they run."""
        if (code := self._srun.poll()) is None:
            self._end_others()
            return None
        printed = self._read()
        with suppress(OSError):  # a full disk
            (self._heartbeats / "srun.log").write_text(printed, encoding="utf-8")
        # srun exits with 0 also when Slurm has ended the job.
        beats = [read_beat(self._heartbeats, rank) for rank in range(self.size)]
        if code == 0 and all(beat is not None and beat.code == 0 for beat in beats):
            return Ending("finished", "")
        return ending_of_step(printed, self._outputs)

    def _read(self) -> str:
        """Return what srun has printed. srun writes at the offset of the file, which does not move."""
        size = os.fstat(self._printed.fileno()).st_size
        return os.pread(self._printed.fileno(), size, 0).decode(errors="backslashreplace")

    def _end_others(self) -> None:
        """Kill the other ranks soon after a signal has killed one: they only wait for it.

        Ranks that exit by themselves are left to Slurm's KillWait: a later one may know the cause.
        """
        now = time.monotonic()
        if self._killed_at is None:
            self._killed_at = now if has_killed_rank(self._read()) else None
        elif now > self._killed_at + OTHERS_SECONDS:
            self._srun.terminate()  # srun then sends SIGKILL to all ranks, also while slurmctld is down
            self._killed_at = float("inf")

    def ask_where(self) -> None:
        """Make every rank write the stacks of its threads."""
        self._signal("QUIT")

    def kill(self) -> None:
        """Kill all ranks."""
        self._signal("KILL")

    def _signal(self, name: str) -> None:
        """Send a signal to all ranks. If Slurm does not answer, the supervisor calls this again."""
        for step in steps_of(self._job, lambda step: step == self._name):
            calls.look("scancel", f"--signal={name}", step)


def is_step(name: str) -> bool:
    """Return whether a step of this name has ranks, or checks nodes."""
    return name == CHECK or name.startswith("start-")


def has_killed_rank(printed: str) -> bool:
    """Return whether srun says that a signal has killed a rank, and not a request to stop that came too early."""
    words = [words for _, _, words in ENDED_RANKS.findall(printed)]
    return any(each not in STOP_WORDS and not each.startswith("Exited") for each in words)


def ending_of_step(printed: str, folder: Path) -> Ending:
    """Return how ranks ended that have not finished.

    Args:
        printed: what srun printed. Its first line about a rank is of the one that failed first; Slurm ended the others.
        folder: folder of the submission.
    """
    if lost := re.search(r"^srun: error: Node failure on (\S+)", printed, re.MULTILINE):
        return Ending("failed", f"lost {lost[1]}", lost[1], fault="node", is_lost=True)
    found = ENDED_RANKS.findall(printed)
    if not found:
        lines = [line for line in printed.splitlines() if "error" in line] or ["the ranks were ended from outside"]
        return Ending("failed", lines[0].removeprefix("srun: error: "), fault="scheduler")
    # A fault of storage or of the data ends many ranks at once, and not all of them know it.
    with_class = [f"Exited with exit code {code}" for code in (*STORAGE_EXIT_CODES, DATA_EXIT_CODE)]
    node, number, words = next((each for each in found if each[2] in with_class), found[0])
    rank = int(number)
    coded = re.fullmatch(r"Exited with exit code (\d+)", words)
    # A request that comes before a rank can handle it kills the rank.
    request = STOPPED.get(int(coded[1])) if coded else STOP_WORDS.get(words)
    if request is not None:
        return Ending("stopped", request.name, node, rank)
    if coded is None:
        # srun says this before the ranks' ends only if the step was ended from outside.
        is_cancelled = "Job step aborted" in printed.partition(f"srun: error: {node}: task")[0]
        return Ending("failed", f"rank {rank} on {node}: {words}", node, rank, "scheduler" if is_cancelled else "node")
    error = last_error(output_of(folder, rank))
    fault = fault_of_exit(int(coded[1]), error)
    return Ending("failed", f"rank {rank} on {node}: {error or words}", node, rank, fault)


def gpu_options(gpus_per_node: str) -> list[str]:
    """Return the options of `srun` with which each task sees all of the job's GPUs of its node."""
    return [] if gpus_per_node == "0" else [f"--gpus-per-node={gpus_per_node}"]


def srun_command(plan: LaunchPlan, folder: Path, nodes: int, name: str, chosen: Sequence[str] = ()) -> list[str]:
    """Return the command that starts one task for each rank. Slurm ends all tasks when one fails.

    Args:
        plan: what the ranks are.
        folder: of the submission.
        nodes: number of nodes.
        name: name of the start.
        chosen: options that choose nodes and processors of the job.
    """
    ranks = nodes * plan.processes_per_node
    # Every rank sees its node's GPUs and takes the one of its local rank, so that they can copy to each other.
    gpus = [] if "gpus-per-task" in plan.srun else gpu_options(plan.gpus_per_node)
    options = [
        f"--{name}" if value is True else f"--{name}={value}" for name, value in plan.srun.items() if value is not False
    ]
    return [
        "srun",
        f"--job-name={name}",
        f"--nodes={nodes}",
        *chosen,
        f"--ntasks={ranks}",
        f"--ntasks-per-node={plan.processes_per_node}",
        f"--cpus-per-task={plan.cpus_per_process}",  # srun of Slurm 22.05 to 23.02 does not take it from sbatch
        *gpus,
        "--export=ALL",  # the job may be submitted with --export=NONE, which srun would take for its own
        "--kill-on-bad-exit=1",
        "--unbuffered",
        f"--output={str(folder).replace('%', '%%')}/ranks/rank-%5t.log",
        "--open-mode=append",
        *options,
        *plan.prefix,
        *rank_command("launchers.rank", plan.entry, f"{folder}/config.yaml"),
    ]
