"""What befalls runs on clusters, one after another: `make slurm` (a quarter of an hour) tells what each cost.

A run of two nodes with two ranks each, sharded by FSDP2, has to end with the numbers of the run that nothing befell.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pretrain.checkpoint.fence import starts_noted_at
from tests.end_to_end.test_tracking import delivered, journal
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
        """What a fault at some time, after some step, cost a run that it befell once."""
        launches = run.launches()
        told = next(launch for launch in launches if launch.time > at and launch.event in ("failed", "stopped"))
        started = next(launch for launch in launches if launch.time > told.time and launch.event == "started")
        new = min(line["time"] for line in steps_of(run.folder) if line["time"] > started.time)
        lost = step - (told.step or 0)
        self.rows.append((name, told.time - at, started.time - told.time, new - started.time, max(lost, 0)))

    def print(self) -> None:
        print("\n| what | until known, s | until ranks start, s | until the first new step, s | steps done again |")
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
    """One that gives those it preempts as long as a loaded machine may need."""
    with running_cluster(tmp_path_factory.mktemp("cluster"), grace=120) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def shared(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs, with their recipe."""
    folder = tmp_path_factory.mktemp("runs")
    write_recipe(folder, corpus_folder)
    return folder


@pytest.fixture(scope="module")
def reference(cluster: Cluster, shared: Path, report: Report) -> Path:
    """The run that nothing befell."""
    run = submit(cluster, shared, "reference")
    submitted = run.wait_for("submitted")
    run.wait_for("finished")
    started = run.wait_for("started")
    first = next(line["time"] for line in steps_of(run.folder) if line["step"] == 1)
    report.rows.append(("submitted", 0.0, started.time - submitted.time, first - started.time, 0))
    return run.folder


def submit(cluster: Cluster, shared: Path, name: str, *more: str) -> SubmittedRun:
    return SubmittedRun(cluster, shared / "recipe.yaml", name, *TWO_BY_TWO, *WATCHED, *more)


def befall(run: SubmittedRun, fault: Callable[[], object], after: int = 7) -> tuple[float, int]:
    """Brings a fault on a run; returns when, and after which step."""
    run.wait_for_step(after)
    at, step = time.time(), run.last_step()
    fault()
    return at, step


def kill(run: SubmittedRun, rank: int, number: signal.Signals) -> None:
    [pid] = run.cluster.processes(run.job, rank)
    os.kill(pid, number)


def test_a_rank_that_is_killed(cluster: Cluster, shared: Path, reference: Path, report: Report):
    run = submit(cluster, shared, "killed")
    at, step = befall(run, lambda: kill(run, 2, signal.SIGKILL))
    run.wait_for("finished")
    assert run.wait_for("failed").reason.endswith(": Killed")
    report.add("one rank killed -9", run, at, step)
    assert_trained_as(run.folder, reference)


def test_a_rank_that_freezes(cluster: Cluster, shared: Path, reference: Path, report: Report):
    run = submit(cluster, shared, "frozen")
    at, step = befall(run, lambda: kill(run, 1, signal.SIGSTOP))
    failed = run.wait_for("failed")
    assert failed.reason.startswith(f"rank 1 on {failed.nodes[0]} hangs"), failed.reason
    assert failed.faulty == failed.nodes[0]
    run.wait_for("finished")
    report.add("one rank frozen (limit 15 s)", run, at, step)
    assert_trained_as(run.folder, reference)


def test_a_rank_out_of_memory(cluster: Cluster, shared: Path, reference: Path, report: Report):
    run = submit(cluster, shared, "memory")
    group = memory_group()
    try:
        at, step = befall(run, lambda: exhaust(group, run.cluster.processes(run.job, 3)[0]))
        run.wait_for("failed")
        run.wait_for("finished")
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text(), "the group is empty", 30)
        group.rmdir()
    report.add("one rank out of memory", run, at, step)
    assert_trained_as(run.folder, reference)


def memory_group() -> Path:
    """A control group whose processes are killed when they ask for more memory."""
    for parent, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(parent) / f"byteloom-test-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text("100000")
            return group
        except OSError:
            if group.exists():
                group.rmdir()
    pytest.skip("this machine lets nobody make control groups of memory")


def exhaust(group: Path, pid: int) -> None:
    (group / "cgroup.procs").write_text(str(pid))


def test_a_node_that_is_lost(cluster: Cluster, shared: Path, reference: Path, report: Report):
    for place, name in ((1, "second"), (0, "first")):
        run = submit(cluster, shared, f"lost-{name}")
        node = run.wait_for("started").nodes[place]
        at, step = befall(run, lambda node=node: cluster.crash(node))
        failed = run.wait_for("failed")
        assert (failed.reason, failed.faulty) == (f"lost {node}", node)
        run.wait_for("finished")
        assert node not in run.launches()[-1].nodes
        report.add(f"the {name} node lost (Slurm's limit 10 s)", run, at, step)
        assert_trained_as(run.folder, reference)
        cluster.start_node(node)
        wait_until(lambda: cluster.run("sinfo", "-h", "-t", "idle", "-p", "low", "-o", "%D") == "4", "all nodes", 60)


def test_preemption(cluster: Cluster, shared: Path, reference: Path, report: Report):
    run = submit(cluster, shared, "preempted", "tracking.enabled=true")
    at, step = befall(
        run,
        lambda: cluster.run("sbatch", "-p", "high", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 3"),
    )
    run.wait_for("finished")
    report.add("preempted for 3 s", run, at, step)
    assert_trained_as(run.folder, reference)
    status, metrics = delivered(f"sqlite:///{shared}/runs/mlflow.db")
    assert status.info.status == "FINISHED"
    assert metrics == journal(run.folder)


def test_two_time_limits(cluster: Cluster, shared: Path, report: Report):
    slow = "validation.every=1"
    byteloom(cluster, shared, "train", "recipe.yaml", "run.name=slow", "launch.processes=4", slow)
    run = submit(cluster, shared, "limited", slow, "--time=2", f"--cluster={quick_preset(shared)}")
    run.wait_for("requeued", 2)
    run.wait_for("finished")
    stops = [launch for launch in run.launches() if launch.event == "stopped"]
    assert {stop.reason for stop in stops} == {"SIGUSR2: the time limit is near"}
    assert_trained_as(run.folder, shared / "runs/slow")


def quick_preset(folder: Path) -> Path:
    """Asks for the signal 45 s before the end."""
    path = folder / "quick.yaml"
    path.write_text("signal_seconds: 45\n")
    return path


def test_on_other_nodes_and_another_engine_by_overrides_alone(cluster: Cluster, shared: Path, reference: Path):
    run = submit(cluster, shared, "moving")
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
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster whose nodes have networks of their own."""
    with running_cluster(tmp_path_factory.mktemp("wide"), network=True) as cluster:
        yield cluster


@pytest.mark.parametrize("place", [1, 0], ids=["second", "first"])
def test_a_node_that_is_cut_off_writes_no_more(
    wide: Cluster, shared: Path, reference: Path, report: Report, place: int
):
    run = submit(wide, shared, f"cut-{place}")
    node = run.wait_for("started").nodes[place]
    old = [2 * place, 2 * place + 1]
    run.wait_for_step(8)
    alive = [wide.processes(run.job, rank)[0] for rank in old]
    at, step = befall(run, lambda: wide.cut(node))
    run.wait_for("started", 2)
    assert all(Path(f"/proc/{pid}").exists() for pid in alive)  # they live on
    done = run.wait_for("finished")
    assert node not in done.nodes
    assert last_step_of(run.folder) == STEPS
    before = content(run.folder)
    wide.mend(node)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in alive), "the old ranks are gone", 120)
    assert content(run.folder) == before
    assert starts_noted_at(run.folder / "generation") == 2
    report.add(f"the {'second' if place else 'first'} node cut off (Slurm's limit 10 s)", run, at, step)
    assert_trained_as(run.folder, reference)
    wait_until(lambda: wide.run("sinfo", "-h", "-t", "idle", "-p", "low", "-o", "%D") == "4", "all nodes", 60)


def content(folder: Path) -> dict[str, bytes]:
    """Of everything that tells of the run: not what ranks of one start alone write."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "jobs" not in path.relative_to(folder).parts]
    return {str(path): path.read_bytes() for path in paths}


def test_a_node_with_repeated_faults_is_excluded(cluster: Cluster, shared: Path, reference: Path):
    run = submit(cluster, shared, "excluded")
    node = run.wait_for("started").nodes[1]
    for after in (7, 16):
        befall(run, lambda: kill(run, 2, signal.SIGKILL), after)
        run.wait_for("failed", 1 if after == 7 else 2)
    assert run.wait_for("excluded").faulty == node
    done = run.wait_for("finished")
    assert node not in done.nodes
    assert cluster.job(run.job)["ExcNodeList"] == node
    assert_trained_as(run.folder, reference)
