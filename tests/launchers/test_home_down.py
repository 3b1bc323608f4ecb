"""Runs in the background whose checkpoint home or corpus cannot be used for a while, with the real command."""

import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import yaml

from launchers.supervision.record import LaunchRecord
from tests import commands
from tests.conftest import recipe_tree
from tests.end_to_end.runs.test_resume import RunUnderTest
from tests.launchers.test_supervise import _put_tests_on_python_path  # noqa: F401 a fixture
from tests.s3 import faulty_proxy, s3_server
from tests.slurm.cluster import wait_until

STEPS = 20


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("when", ["start", "end"])
def test_home_that_is_down_is_waited_for(corpus_folder: Path, tmp_path: Path, when: str):
    """The rank repeats a request for up to two minutes before it gives up, so this takes minutes."""
    recipe = tmp_path / "recipe.yaml"
    tree = recipe_tree(corpus_folder)
    tree["train"]["steps"] = STEPS
    tree["checkpoint"] = {"every": 100}
    tree["supervise"] = {"attempts": 1, "pause_seconds": 1.0}
    recipe.write_text(yaml.safe_dump(tree))
    is_down, was_down = threading.Event(), threading.Event()
    run = RunUnderTest(recipe, tmp_path, f"down-at-{when}")  # servers of one process share their objects

    def fault_of(path: str, credentials: str) -> str | None:
        """Go down before the first request at the start, or before the first one about the last checkpoint."""
        if not was_down.is_set() and (when == "start" or f"step-{STEPS:08d}" in path):
            was_down.set()
            is_down.set()
        return "broken" if is_down.is_set() else None

    with s3_server("home"), faulty_proxy(fault_of):
        words = ["submit", recipe, "--cluster=local", "--processes-per-node=1", f"run.name=down-at-{when}"]
        # A pipe would be the ranks' too.
        commands.run([*words, "checkpoint.home=s3://home/runs"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
        record = LaunchRecord(run.folder)
        wait_until(lambda: "failed" in [launch.event for launch in record.read()], "the rank gives up", 400)
        is_down.clear()
        wait_until(lambda: record.read()[-1].event == "finished", "the end", 200)
    failed = [launch for launch in record.read() if launch.event == "failed"]
    assert {(launch.fault, launch.faulty) for launch in failed} == {("storage", "")}
    assert [step for step, _ in run.numbers()] == list(range(STEPS + 1))


@pytest.mark.long
@pytest.mark.timeout(300)
def test_missing_shard_is_waited_for(corpus_folder: Path, tmp_path: Path):
    """The failures use up no attempt, though the recipe allows only one."""
    shutil.copytree(corpus_folder, tmp_path / "corpora")
    shard = next((tmp_path / "corpora/train").glob("*.tar"))
    recipe = tmp_path / "recipe.yaml"
    tree = recipe_tree(tmp_path / "corpora")
    tree["train"]["steps"] = 5
    tree["supervise"] = {"attempts": 1, "pause_seconds": 0.5}
    recipe.write_text(yaml.safe_dump(tree))
    shard.rename(tmp_path / "elsewhere.tar")
    run = RunUnderTest(recipe, tmp_path, "missing")
    words = ["submit", recipe, "--cluster=local", "--processes-per-node=2", "run.name=missing"]
    commands.run(words, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    record = LaunchRecord(run.folder)
    wait_until(lambda: "failed" in [launch.event for launch in record.read()], "the ranks miss the shard", 120)
    (tmp_path / "elsewhere.tar").rename(shard)
    wait_until(lambda: record.read()[-1].event == "finished", "the end", 120)
    failed = [launch for launch in record.read() if launch.event == "failed"]
    assert {(launch.fault, launch.faulty) for launch in failed} == {("data", "")}
    assert f"{shard.name} cannot be read: No such file" in failed[0].reason
