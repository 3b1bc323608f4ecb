"""Supervised ranks on this machine under submitit's local executor: real processes that die and hang."""

import os
import platform
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from launchers.slurm.hosts import expand_hosts
from launchers.slurm.presets import ClusterConfig, ClusterError, load_cluster
from launchers.submission import Submission
from launchers.supervision.hangs import HangDetector
from launchers.supervision.heartbeat import Beat, Heartbeat, read_beat
from launchers.supervision.plan import SuperviseConfig
from launchers.supervision.record import Launch, LaunchRecord
from tests.launchers.plans import modelless_plan
from tests.slurm.cluster import wait_until

ROOT = Path(__file__).parents[2]
SHORT_LIMITS = SuperviseConfig(start_seconds=30, step_seconds=1.5)


@pytest.fixture(autouse=True)
def _put_tests_on_python_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))


def submission(run: Path, starts: Sequence[dict[str, Any]], limits: SuperviseConfig = SHORT_LIMITS) -> Submission:
    recipe = yaml.safe_dump({"run": str(run), "starts": list(starts)})
    cluster = ClusterConfig(scheduler="local", processes_per_node=2)
    return Submission(run, recipe, modelless_plan(run, cluster, limits), cluster)


def submit_and_wait_for(run: Path, event: str, starts: Sequence[dict[str, Any]]) -> list[Launch]:
    submission(run, starts).submit()
    return wait_for(run, event)


def wait_for(run: Path, event: str) -> list[Launch]:
    record = LaunchRecord(run)
    wait_until(lambda: event in [launch.event for launch in record.read()], f"{event} in {run}", 240)
    return record.read()


def test_ranks_that_die_freeze_or_loop_are_restarted_and_the_reasons_recorded(tmp_path: Path):
    launches = submit_and_wait_for(
        tmp_path / "run",
        "finished",
        [
            {"rank": 1, "does": "die", "checkpoint": 1},
            {"rank": 0, "does": "freeze", "checkpoint": 2},
            {"rank": 1, "does": "loop", "checkpoint": 3},
            {"does": "finish"},
        ],
    )
    assert [launch.event for launch in launches if launch.event != "submitted"] == [
        *("started", "failed") * 3, "started", "finished",
    ]  # fmt: skip
    died, froze, looped = [launch for launch in launches if launch.event == "failed"]
    assert died.reason == "rank 1: was killed by SIGKILL"
    assert froze.reason.startswith(f"rank 0 on {platform.node()} hangs in phase step after step 2: no heartbeat for ")
    assert froze.reason.endswith("(limit: supervise.step_seconds) and does not answer")
    assert "hangs in phase step after step 3" in looped.reason
    assert {(launch.fault, launch.faulty) for launch in (died, froze, looped)} == {
        ("code", "")
    }  # there is no other node
    stack = tmp_path / "run/jobs/001/heartbeats/start-2/rank-00001.stack"
    assert "loop_for_ever" in stack.read_text()
    assert [launch.step for launch in (died, froze, looped)] == [1, 2, 3]


def test_failures_without_progress_end_the_run_with_a_report(tmp_path: Path):
    launches = submit_and_wait_for(
        tmp_path / "run",
        "gave_up",
        [{"rank": 1, "does": "die", "checkpoint": 5}, {"rank": 1, "does": "fail", "checkpoint": 5}],
    )
    assert [launch.event for launch in launches].count(
        "started"
    ) == 1 + SHORT_LIMITS.attempts  # the first start left a checkpoint
    reason = (
        "3 starts from step 5 made no newer checkpoint; the last one ended with: rank 1: error: the disk is on fire"
    )
    assert launches[-1].reason.startswith(reason)
    page = (tmp_path / "run/gave-up.md").read_text()
    assert page.startswith(f"# Given up: {reason}")
    assert "    error: the disk is on fire" in page and "was killed by SIGKILL" in page


def test_stopped_run_is_restarted_only_by_a_new_submission(tmp_path: Path):
    run = tmp_path / "run"
    first = submission(run, [{"does": "wait", "rank": 9}])
    job = int(first.submit())
    with pytest.raises(ClusterError, match=f"{run} has the job {job}, which is running"):
        submission(run, [{"does": "finish"}]).submit()
    wait_for(run, "started")
    os.kill(job, signal.SIGTERM)  # it reaches the ranks before or during their imports
    assert wait_for(run, "stopped")[-1].reason == "SIGTERM: asked by hand"
    os.waitpid(job, 0)
    assert submit_and_wait_for(run, "finished", [{"does": "finish"}])[-1].restart == 0


def test_heartbeat_is_written_when_the_phase_changes_and_only_under_a_supervisor(tmp_path: Path):
    heartbeat = Heartbeat(tmp_path, 3)
    heartbeat.beat("step", 7)
    heartbeat.beat("step", 8)
    assert read_beat(tmp_path, 3).step == 7  # at most one beat per second within a phase
    heartbeat.beat("checkpoint", 8)
    assert (read_beat(tmp_path, 3).phase, read_beat(tmp_path, 3).step) == ("checkpoint", 8)
    Heartbeat.of({}, 0).beat("step", 1)
    assert read_beat(tmp_path, 0) is None


def test_many_ranks_write_as_many_heartbeats_as_128(tmp_path: Path):
    assert Heartbeat(tmp_path, 0, ranks=128).seconds == Heartbeat(tmp_path, 0).seconds == 1
    assert Heartbeat(tmp_path, 0, ranks=1024).seconds == 8


def test_supervisor_reads_each_heartbeat_of_many_ranks_as_seldom_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    reads = list[int]()

    def counted(folder: Path, rank: int) -> Beat | None:
        reads.append(rank)
        return read_beat(folder, rank)

    monkeypatch.setattr("launchers.supervision.hangs.read_beat", counted)
    Heartbeat(tmp_path, 5, ranks=1024).beat("step", 1)
    begin, detector = time.monotonic(), HangDetector(tmp_path, 1024, SuperviseConfig(), lambda: None)
    for _ in range(20):
        assert not detector.has_hung()
    assert 1024 <= len(reads) <= 1024 * (1 + (time.monotonic() - begin) / 8)


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-3,07],login", ["n1", "n2", "n3", "n07", "login"]),
        ("r[1-2]n[08-10]", [f"r{r}n{n}" for r in (1, 2) for n in ("08", "09", "10")]),
    ],
)
def test_slurm_host_lists_are_expanded(nodes: str, names: list[str]):
    assert expand_hosts(nodes) == names


def test_presets_load_and_their_faults_are_reported_in_one_line(tmp_path: Path):
    assert load_cluster("gpu", {"nodes": "2-4", "time": "12:00:00"}).least_nodes == 2
    assert load_cluster("local", {}).scheduler == "local"
    own = tmp_path / "own.yaml"
    own.write_text("time: 12:00:00\nnodes: 3\n")
    assert (load_cluster(str(own), {}).time, load_cluster(str(own), {}).nodes) == ("12:00:00", "3")
    own.write_text("partitio: gpu\n")
    with pytest.raises(
        ClusterError, match=r"own.yaml: partitio is not a field of a preset \(did you mean partition\?\)"
    ):
        load_cluster(str(own), {})
    with pytest.raises(ClusterError, match="--cluster nowhere: no such preset; choose one of cpu, gpu, local"):
        load_cluster("nowhere", {})
