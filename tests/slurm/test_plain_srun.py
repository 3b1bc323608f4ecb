"""`byteloom train` as the tasks of a plain `srun`, without a supervisor."""

import subprocess
from pathlib import Path

import pytest

from pretrain.training.run_status import status_of
from tests.commands import BYTELOOM, environment
from tests.slurm.cluster import Cluster
from tests.slurm.submitted import steps_of, write_recipe

pytestmark = pytest.mark.long


@pytest.mark.timeout(600)
def test_plain_srun_trains_on_two_nodes_and_resumes(cluster: Cluster, corpus_folder: Path, tmp_path: Path):
    recipe = write_recipe(tmp_path, corpus_folder)
    srun = ["srun", "--partition=low", "--nodes=2", "--ntasks=2", "--kill-on-bad-exit=1", f"--chdir={tmp_path}"]
    for steps in (3, 5):
        command = [*cluster.inside, *srun, BYTELOOM, "train", recipe, "run.name=plain", f"train.steps={steps}"]
        env = {**cluster.environment, **environment(), "SLURM_CONF": cluster.environment["SLURM_CONF"]}
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/plain"
    assert [line["step"] for line in steps_of(run)][-5:] == [1, 2, 3, 4, 5]
    status = status_of(run)
    assert (status.state, status.step, status.history) == ("finished", 5, [])
