"""Runs submitted to a real cluster with the real command, and their records."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launchers.supervision.record import Launch, LaunchRecord
from tests import commands
from tests.commands import BYTELOOM, environment
from tests.conftest import recipe_tree
from tests.slurm.cluster import Cluster, wait_until

STEPS = 40
COMPARED_METRICS = ("train/bits_per_byte", "validation/bits_per_byte", "gradient_norm")
PATIENCE = 240.0
"""Deadline in seconds for any wait on a loaded machine."""


def write_recipe(folder: Path, corpus_folder: Path) -> Path:
    """Write the recipe of a short run."""
    tree: dict[str, Any] = recipe_tree(corpus_folder)
    tree["train"]["steps"] = STEPS
    tree["engine"]["name"] = "fsdp"
    tree["checkpoint"] = {"every": 5}
    tree["validation"]["every"] = 20
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


class SubmittedRun:
    """Run submitted to a cluster.

    Args:
        arguments: overrides and options of the submission.
    """

    def __init__(self, cluster: Cluster, recipe: Path, name: str, *arguments: str) -> None:
        self.cluster = cluster
        self.cwd = recipe.parent
        self.folder = self.cwd / "runs" / name
        self.record = LaunchRecord(self.folder)
        self.job = self.submit(recipe, f"run.name={name}", "--cluster=cpu", *arguments)

    def submit(self, *arguments: object) -> str:
        return byteloom(self.cluster, self.cwd, "submit", *arguments).stdout.strip()

    def launches(self) -> list[Launch]:
        return self.record.read()

    def events(self) -> list[str]:
        return [launch.event for launch in self.launches()]

    def wait_for(self, event: str, count: int = 1) -> Launch:
        """Wait for the count-th event of a kind and return it."""

        def found() -> Launch | None:
            matching = [launch for launch in self.launches() if launch.event == event]
            return matching[count - 1] if len(matching) >= count else None

        return self._wait(found, f"{event} in {self.folder}")

    def wait_for_step(self, step: int) -> None:
        self._wait(lambda: self.last_step() >= step, f"step {step} in {self.folder}")

    def _wait(self, condition: Callable[[], Any], description: str) -> Any:
        def check() -> Any:
            if found := condition():
                return found
            assert "gave_up" not in self.events(), (self.folder / "gave-up.md").read_text()
            return None

        try:
            return wait_until(check, description, PATIENCE)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from error

    def logs(self) -> str:
        """Return the records and logs of the run, for the message of a failed test."""
        files = sorted(self.folder.glob("jobs/*/batch.log")) + sorted(self.folder.glob("jobs/*/ranks/*.log"))
        texts = [f"{path}:\n{path.read_text()[-1500:]}" for path in [self.record.path, *files] if path.exists()]
        return "\n".join([*texts, self.cluster.run("scontrol", "show", "job", self.job, check=False)])

    def last_step(self) -> int:
        return last_step_of(self.folder)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def last_step_of(folder: Path) -> int:
    try:
        return int(steps_of(folder)[-1]["step"])
    except (FileNotFoundError, ValueError, IndexError):  # missing, or read in the middle of a write
        return -1


def byteloom(
    cluster: Cluster, cwd: Path, *arguments: object, check: bool = True, extra: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command where it can reach the cluster: the real one in a cluster with a network, else a fork."""
    env = {**cluster.environment, **environment(), "SLURM_CONF": cluster.environment["SLURM_CONF"], **(extra or {})}
    if cluster.inside:
        command = [*cluster.inside, "env", f"--chdir={cwd}", BYTELOOM, *map(str, arguments)]
        # A command on another host starts in /.
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    else:
        done = commands.run(arguments, cwd=cwd, env=env, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


def assert_trained_as(folder: Path, reference: Path, relative: float = 0.0, steps: int = STEPS) -> None:
    """Check that a run has every step once, with the metrics of the uninterrupted run."""
    own, uninterrupted = steps_of(folder), steps_of(reference)
    assert [line["step"] for line in own] == [line["step"] for line in uninterrupted] == list(range(steps + 1))
    for name in COMPARED_METRICS:
        values = [line[name] for line in own if name in line]
        expected = [line[name] for line in uninterrupted if name in line]
        assert values == (pytest.approx(expected, rel=relative) if relative else expected), name
