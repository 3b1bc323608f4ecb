"""`byteloom submit` against a real Slurm: four ranks on two nodes, and what ends them."""

import os
import signal
from pathlib import Path

from tests.end_to_end.test_tracking import delivered, journal
from tests.slurm.cluster import Cluster
from tests.slurm.submitted import SubmittedRun, assert_trained_as, byteloom, write_recipe

TWO_BY_TWO = ("--nodes=2", "--processes-per-node=2", "--cpus-per-process=1", "--partition=low", "--time=120")


def test_preempted_and_killed_it_goes_on_as_if_nothing_had_been(cluster: Cluster, corpus_folder: Path, tmp_path: Path):
    recipe = write_recipe(tmp_path, corpus_folder)
    run = SubmittedRun(cluster, recipe, "faulty", "tracking.enabled=true", *TWO_BY_TWO)
    run.wait_for_step(15)
    cluster.run("sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    stopped = run.wait_for("stopped")
    assert stopped.reason.endswith(": preempted")
    assert run.wait_for("requeued").reason == stopped.reason
    run.wait_for("started", 2)
    assert stopped.step == run.last_step() > 10

    run.wait_for_step(stopped.step + 15)
    [victim] = cluster.processes(run.job, rank=3)
    assert f"PYTHONPATH={run.folder}/jobs/001/code" in Path(f"/proc/{victim}/environ").read_text()
    os.kill(victim, signal.SIGKILL)
    failed = run.wait_for("failed")
    assert failed.reason == f"rank 3 on {failed.nodes[1]}: Killed"
    run.wait_for("finished")
    assert run.events() == [
        "submitted", "started", "stopped", "requeued", "started", "failed", "started", "finished",
    ]  # fmt: skip

    byteloom(cluster, tmp_path, "train", recipe, "run.name=reference", "engine.name=ddp")
    assert_trained_as(run.folder, tmp_path / "runs/reference", relative=1e-4)
    mlflow_run, metrics = delivered(f"sqlite:///{tmp_path}/runs/mlflow.db")
    assert mlflow_run.info.status == "FINISHED"
    assert metrics == journal(run.folder)
