"""Faults of runs on clusters, one after another; `make slurm` (15 minutes) prints the cost of each.

A run on two nodes with two ranks each, sharded by FSDP2, must end with the metrics of the undisturbed run.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pretrain.checkpoint.homes.fence import starts_noted_at
from tests.end_to_end.runs.test_tracking import delivered, journal
from tests.slurm.cluster import Cluster, running_cluster, wait_until
from tests.slurm.submitted import (
    STEPS,
    SubmittedRun,
    assert_trained_as,
    byteloom,
    last_step_of,
    steps_of,
    write_recipe,
)

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

TWO_BY_TWO = ("--nodes=2", "--processes-per-node=2", "--cpus-per-process=1", "--partition=low", "--time=120")
WATCHED = ("supervise.start_seconds=300", "supervise.step_seconds=15", "supervise.evaluation_seconds=60")


@dataclass
class Report:
    rows: list[tuple[str, float, float, float, int]] = field(default_factory=list)

    def add(self, name: str, run: SubmittedRun, at: float, step: int) -> None:
        """Add the cost of one fault, which hit a run at a time, after a step."""
        launches = run.launches()
        noticed = next(launch for launch in launches if launch.time > at and launch.event in ("failed", "stopped"))
        started = next(launch for launch in launches if launch.time > noticed.time and launch.event == "started")
        new = min(line["time"] for line in steps_of(run.folder) if line["time"] > started.time)
        lost = step - (noticed.step or 0)
        self.rows.append((name, noticed.time - at, started.time - noticed.time, new - started.time, max(lost, 0)))

    def print(self) -> None:
        print("\n| fault | until noticed, s | until ranks start, s | until the first new step, s | repeated steps |")
        print("| --- | --- | --- | --- | --- |")
        for name, *seconds, lost in self.rows:
            print(f"| {name} | {' | '.join(f'{each:.1f}' for each in seconds)} | {lost} |")


@pytest.fixture(scope="module")
def report() -> Iterator[Report]:
    report = Report()
    yield report
    report.print()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Run a cluster that gives preempted jobs as much time as a loaded machine may need."""
    with running_cluster(tmp_path_factory.mktemp("cluster"), grace=120) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def run_folder(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of all runs, with their recipe."""
    folder = tmp_path_factory.mktemp("runs")
    write_recipe(folder, corpus_folder)
    return folder


@pytest.fixture(scope="module")
def reference(cluster: Cluster, run_folder: Path, report: Report) -> Path:
    """Run without a disturbance, and return the run's folder."""
    run = submit(cluster, run_folder, "reference")
    submitted = run.wait_for("submitted")
    run.wait_for("finished")
    started = run.wait_for("started")
    first = next(line["time"] for line in steps_of(run.folder) if line["step"] == 1)
    report.rows.append(("submitted", 0.0, started.time - submitted.time, first - started.time, 0))
    return run.folder


def submit(cluster: Cluster, run_folder: Path, name: str, *more: str) -> SubmittedRun:
    return SubmittedRun(cluster, run_folder / "recipe.yaml", name, *TWO_BY_TWO, *WATCHED, *more)


def inject(run: SubmittedRun, fault: Callable[[], object], after: int = 7) -> tuple[float, int]:
    """Inject a fault into a run; return the time, and the last step before it."""
    run.wait_for_step(after)
    at, step = time.time(), run.last_step()
    fault()
    return at, step


def kill(run: SubmittedRun, rank: int, number: signal.Signals) -> None:
    [pid] = run.cluster.processes(run.job, rank)
    os.kill(pid, number)


def test_run_resumes_after_a_rank_is_killed(cluster: Cluster, run_folder: Path, reference: Path, report: Report):
    run = submit(cluster, run_folder, "killed")
    at, step = inject(run, lambda: kill(run, 2, signal.SIGKILL))
    run.wait_for("finished")
    assert run.wait_for("failed").reason.endswith(": Killed")
    report.add("one rank killed -9", run, at, step)
    assert_trained_as(run.folder, reference)


def test_run_resumes_after_a_rank_freezes(cluster: Cluster, run_folder: Path, reference: Path, report: Report):
    run = submit(cluster, run_folder, "frozen")
    at, step = inject(run, lambda: kill(run, 1, signal.SIGSTOP))
    failed = run.wait_for("failed")
    assert failed.reason.startswith(f"rank 1 on {failed.nodes[0]} hangs"), failed.reason
    assert failed.faulty == failed.nodes[0]
    run.wait_for("finished")
    report.add("one rank frozen (limit 15 s)", run, at, step)
    assert_trained_as(run.folder, reference)


def test_run_resumes_after_a_rank_is_out_of_memory(cluster: Cluster, run_folder: Path, reference: Path, report: Report):
    run = submit(cluster, run_folder, "memory")
    group = memory_group()
    try:
        at, step = inject(run, lambda: exhaust(group, run.cluster.processes(run.job, 3)[0]))
        run.wait_for("failed")
        run.wait_for("finished")
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text(), "the group is empty", 30)
        group.rmdir()
    report.add("one rank out of memory", run, at, step)
    assert_trained_as(run.folder, reference)


def memory_group() -> Path:
    """Make a control group whose processes are killed when they allocate more memory."""
    for parent, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(parent) / f"byteloom-test-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text("100000")
            return group
        except OSError:
            if group.exists():
                group.rmdir()
    pytest.skip("this machine does not allow control groups of memory")


def exhaust(group: Path, pid: int) -> None:
    (group / "cgroup.procs").write_text(str(pid))


def test_run_resumes_without_a_lost_node(cluster: Cluster, run_folder: Path, reference: Path, report: Report):
    for place, name in ((1, "second"), (0, "first")):
        run = submit(cluster, run_folder, f"lost-{name}")
        node = run.wait_for("started").nodes[place]
        at, step = inject(run, lambda node=node: cluster.crash(node))
        failed = run.wait_for("failed")
        assert (failed.reason, failed.faulty) == (f"lost {node}", node)
        run.wait_for("finished")
        assert node not in run.launches()[-1].nodes
        report.add(f"the {name} node lost (Slurm's limit 10 s)", run, at, step)
        assert_trained_as(run.folder, reference)
        cluster.start_node(node)
        wait_until(lambda: cluster.run("sinfo", "-h", "-t", "idle", "-p", "low", "-o", "%D") == "4", "all nodes", 60)


def test_preempted_run_resumes_and_its_metrics_reach_mlflow(
    cluster: Cluster, run_folder: Path, reference: Path, report: Report
):
    run = submit(cluster, run_folder, "preempted", "tracking.enabled=true")
    at, step = inject(
        run,
        lambda: cluster.run("sbatch", "-p", "high", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 3"),
    )
    run.wait_for("finished")
    report.add("preempted for 3 s", run, at, step)
    assert_trained_as(run.folder, reference)
    status, metrics = delivered(f"sqlite:///{run_folder}/runs/mlflow.db")
    assert status.info.status == "FINISHED"
    assert metrics == journal(run.folder)


def test_run_resumes_after_two_time_limits(cluster: Cluster, run_folder: Path, report: Report):
    """The run has no end until it was stopped twice, so that the machine's speed does not matter."""
    endless = ("optimizer.schedule.shape=constant", "train.steps=1000000")
    run = submit(cluster, run_folder, "limited", *endless, "--time=2", f"--cluster={quick_preset(run_folder)}")
    run.wait_for("requeued")  # a wait for each, because a start may take all of its time
    run.wait_for("requeued", 2)
    run.wait_for("started", 3)
    stops = [launch for launch in run.launches() if launch.event == "stopped"]
    assert {stop.reason for stop in stops} == {"SIGUSR2: the time limit is near"}
    byteloom(cluster, run_folder, "cancel", run.folder)
    cluster.wait_for(run.job, "CANCELLED")
    steps = run.last_step() + 5
    run.job = run.submit("runs/limited", f"train.steps={steps}", "--time=120")
    run.wait_for("finished")
    same = ("launch.processes=4", endless[0], f"train.steps={steps}")
    byteloom(cluster, run_folder, "train", "recipe.yaml", "run.name=unlimited", *same)
    assert_trained_as(run.folder, run_folder / "runs/unlimited", steps=steps)


def quick_preset(folder: Path) -> Path:
    """Write a preset that requests the signal 45 s before the time limit."""
    path = folder / "quick.yaml"
    path.write_text("signal_seconds: 45\n")
    return path


def test_overrides_move_a_run_to_other_nodes_and_another_engine(cluster: Cluster, run_folder: Path, reference: Path):
    run = submit(cluster, run_folder, "moving")
    for arguments in (("--nodes=3", "engine.name=zero3"), ("--nodes=1", "engine.name=fsdp"), ("--nodes=2-4",)):
        done = run.last_step()
        run.wait_for_step(max(done, 0) + 8)
        cluster.run("scancel", run.job)
        run.wait_for("stopped", len([event for event in run.events() if event == "submitted"]))
        wait_until(lambda: cluster.job(run.job)["JobState"] == "CANCELLED", "cancelled", 60)
        run.job = run.submit("runs/moving", *arguments)
    run.wait_for("finished")
    assert [len(launch.nodes) for launch in run.launches() if launch.event == "started"] == [2, 3, 1, 4]
    assert_trained_as(run.folder, reference, relative=1e-3)


@pytest.fixture(scope="module")
def networked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Run a cluster whose nodes have separate networks."""
    with running_cluster(tmp_path_factory.mktemp("wide"), network=True) as cluster:
        yield cluster


@pytest.mark.parametrize("place", [1, 0], ids=["second", "first"])
def test_node_without_network_writes_nothing_more(
    networked: Cluster, run_folder: Path, reference: Path, report: Report, place: int
):
    run = submit(networked, run_folder, f"cut-{place}")
    node = run.wait_for("started").nodes[place]
    old = [2 * place, 2 * place + 1]
    run.wait_for_step(8)
    alive = [networked.processes(run.job, rank)[0] for rank in old]
    at, step = inject(run, lambda: networked.cut(node))
    run.wait_for("started", 2)
    assert all(Path(f"/proc/{pid}").exists() for pid in alive)  # they are still running
    done = run.wait_for("finished")
    assert node not in done.nodes
    assert last_step_of(run.folder) == STEPS
    before = content(run.folder)
    networked.mend(node)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in alive), "the old ranks are gone", 120)
    assert content(run.folder) == before
    assert starts_noted_at(run.folder / "generation") == 2
    report.add(f"the {'second' if place else 'first'} node cut off (Slurm's limit 10 s)", run, at, step)
    assert_trained_as(run.folder, reference)
    wait_until(lambda: networked.run("sinfo", "-h", "-t", "idle", "-p", "low", "-o", "%D") == "4", "all nodes", 60)


def content(folder: Path) -> dict[str, bytes]:
    """Return the files that describe the run, without those of a single start."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "jobs" not in path.relative_to(folder).parts]
    return {str(path): path.read_bytes() for path in paths}


def test_node_with_repeated_faults_is_excluded(cluster: Cluster, run_folder: Path, reference: Path):
    run = submit(cluster, run_folder, "excluded")
    node = run.wait_for("started").nodes[1]
    for after in (7, 16):
        inject(run, lambda: kill(run, 2, signal.SIGKILL), after)
        run.wait_for("failed", 1 if after == 7 else 2)
    assert run.wait_for("excluded").faulty == node
    done = run.wait_for("finished")
    assert node not in done.nodes
    assert cluster.job(run.job)["ExcNodeList"] == node
    assert_trained_as(run.folder, reference)
