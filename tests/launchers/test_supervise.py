"""Supervised ranks on this machine, behind submitit's local executor: real processes that die and hang."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from launchers.slurm.hosts import expand_hosts
from launchers.slurm.presets import ClusterConfig, ClusterError, load_cluster
from launchers.submission import Submission
from launchers.supervision.heartbeat import Heartbeat, read_beat
from launchers.supervision.plan import LaunchPlan, SuperviseConfig
from launchers.supervision.record import Launch, LaunchRecord
from tests.slurm.cluster import wait_until

ROOT = Path(__file__).parents[2]
SOON = SuperviseConfig(start_seconds=30, step_seconds=1.5)


@pytest.fixture(autouse=True)
def _ranks_find_the_entry(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))


def submission(run: Path, starts: Sequence[dict[str, Any]]) -> Submission:
    plan = LaunchPlan(
        entry="tests.launchers.entry:start",
        run=str(run),
        checkpoints=str(run / "checkpoints"),
        processes_per_node=2,
        cpus_per_process=1,
        gpus_per_node=0,
        supervise=SOON,
    )
    recipe = yaml.safe_dump({"run": str(run), "starts": list(starts)})
    return Submission(run, recipe, plan, ClusterConfig(scheduler="local", processes_per_node=2))


def submit_and_wait(run: Path, last: str, starts: Sequence[dict[str, Any]]) -> list[Launch]:
    submission(run, starts).submit()
    return wait_for(run, last)


def wait_for(run: Path, event: str) -> list[Launch]:
    record = LaunchRecord(run)
    wait_until(lambda: event in [launch.event for launch in record.read()], f"{event} in {run}", 60)
    return record.read()


def test_ranks_that_die_freeze_or_loop_are_started_again_and_the_reasons_recorded(tmp_path: Path):
    launches = submit_and_wait(
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
    assert froze.reason.startswith(f"rank 0 on {froze.faulty} hangs in phase step after step 2: no heartbeat for ")
    assert froze.reason.endswith("(limit: supervise.step_seconds) and does not answer")
    assert "hangs in phase step after step 3" in looped.reason
    stack = tmp_path / "run/jobs/001/heartbeats/start-2/rank-00001.stack"
    assert "loop_for_ever" in stack.read_text()
    assert [launch.step for launch in (died, froze, looped)] == [1, 2, 3]


def test_failures_without_progress_end_with_the_evidence_on_one_page(tmp_path: Path):
    launches = submit_and_wait(
        tmp_path / "run",
        "gave_up",
        [{"rank": 1, "does": "die", "checkpoint": 5}, {"rank": 1, "does": "fail", "checkpoint": 5}],
    )
    assert [launch.event for launch in launches].count(
        "started"
    ) == 1 + SOON.attempts  # the first one left a checkpoint
    reason = (
        "3 starts from step 5 made no newer checkpoint; the last one ended with: rank 1: error: the disk is on fire"
    )
    assert launches[-1].reason.startswith(reason)
    page = (tmp_path / "run/gave-up.md").read_text()
    assert page.startswith(f"# Given up: {reason}")
    assert "    error: the disk is on fire" in page and "was killed by SIGKILL" in page


def test_asked_to_stop_it_stops_and_is_not_started_again_until_it_is_submitted_again(tmp_path: Path):
    run = tmp_path / "run"
    first = submission(run, [{"does": "wait", "rank": 9}])
    job = int(first.submit())
    with pytest.raises(ClusterError, match=f"{run} has the job {job}, which is running"):
        submission(run, [{"does": "finish"}]).submit()
    beats = run / "jobs/001/heartbeats/start-0"
    wait_until(lambda: all(read_beat(beats, rank) for rank in range(2)), "both ranks", 60)
    os.kill(job, signal.SIGTERM)
    assert wait_for(run, "stopped")[-1].reason == "SIGTERM: asked by hand"
    os.waitpid(job, 0)
    assert submit_and_wait(run, "finished", [{"does": "finish"}])[-1].restart == 0


def test_a_beat_is_written_when_the_phase_changes_and_nothing_where_nobody_looks(tmp_path: Path):
    heart = Heartbeat(tmp_path, 3)
    heart.beat("step", 7)
    heart.beat("step", 8)
    assert read_beat(tmp_path, 3).step == 7  # of one phase, a beat a second
    heart.beat("checkpoint", 8)
    assert (read_beat(tmp_path, 3).phase, read_beat(tmp_path, 3).step) == ("checkpoint", 8)
    Heartbeat.of({}, 0).beat("step", 1)
    assert read_beat(tmp_path, 0) is None


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-3,07],login", ["n1", "n2", "n3", "n07", "login"]),
        ("r[1-2]n[08-10]", [f"r{r}n{n}" for r in (1, 2) for n in ("08", "09", "10")]),
    ],
)
def test_slurms_lists_of_hosts_are_expanded(nodes: str, names: list[str]):
    assert expand_hosts(nodes) == names


def test_presets_load_and_what_is_wrong_in_one_is_told_in_a_line(tmp_path: Path):
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
