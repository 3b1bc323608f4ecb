"""Runs that are submitted to a real cluster with the real command, and what is known about how they fared."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launchers.supervision.record import Launch, LaunchRecord
from tests.commands import BYTELOOM, environment
from tests.conftest import recipe_tree
from tests.slurm.cluster import Cluster, wait_until

STEPS = 40
SAME = ("train/bits_per_byte", "validation/bits_per_byte", "gradient_norm")
PATIENCE = 240.0
"""Seconds that a loaded machine may take for anything."""


def write_recipe(folder: Path, corpus_folder: Path) -> Path:
    """A run that is soon over."""
    tree: dict[str, Any] = recipe_tree(corpus_folder)
    tree["train"]["steps"] = STEPS
    tree["engine"]["name"] = "fsdp"
    tree["checkpoint"] = {"every": 5}
    tree["validation"]["every"] = 20
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


class SubmittedRun:
    def __init__(self, cluster: Cluster, recipe: Path, name: str, *arguments: str) -> None:
        """Args:
        arguments: overrides and options of the submission.
        """
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
        """The count-th event of a kind."""

        def found() -> Launch | None:
            told = [launch for launch in self.launches() if launch.event == event]
            return told[count - 1] if len(told) >= count else None

        return self._wait(found, f"{event} in {self.folder}")

    def wait_for_step(self, step: int) -> None:
        self._wait(lambda: self.last_step() >= step, f"step {step} in {self.folder}")

    def _wait(self, condition: Callable[[], Any], what: str) -> Any:
        def check() -> Any:
            if found := condition():
                return found
            assert "gave_up" not in self.events(), (self.folder / "gave-up.md").read_text()
            return None

        try:
            return wait_until(check, what, PATIENCE)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.story()}") from error

    def story(self) -> str:
        """What is known, for a test that fails."""
        logs = sorted(self.folder.glob("jobs/*/batch.log")) + sorted(self.folder.glob("jobs/*/ranks/*.log"))
        told = [f"{path}:\n{path.read_text()[-1500:]}" for path in [self.record.path, *logs] if path.exists()]
        return "\n".join([*told, self.cluster.run("scontrol", "show", "job", self.job, check=False)])

    def last_step(self) -> int:
        return last_step_of(self.folder)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def last_step_of(folder: Path) -> int:
    try:
        return int(steps_of(folder)[-1]["step"])
    except (FileNotFoundError, ValueError, IndexError):  # not there yet, or caught in the middle of a line
        return -1


def byteloom(
    cluster: Cluster, cwd: Path, *arguments: object, check: bool = True, extra: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The real command, where it can reach the cluster."""
    done = subprocess.run(
        [*cluster.inside, "env", f"--chdir={cwd}", BYTELOOM, *map(str, arguments)],  # another host begins in /
        cwd=cwd,
        env={**cluster.environment, **environment(), "SLURM_CONF": cluster.environment["SLURM_CONF"], **(extra or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def assert_trained_as(folder: Path, reference: Path, relative: float = 0.0) -> None:
    """Every step is there once, with the numbers of the uninterrupted run."""
    told, theirs = steps_of(folder), steps_of(reference)
    assert [line["step"] for line in told] == [line["step"] for line in theirs] == list(range(STEPS + 1))
    for name in SAME:
        ours = [line[name] for line in told if name in line]
        expected = [line[name] for line in theirs if name in line]
        assert ours == (pytest.approx(expected, rel=relative) if relative else expected), name
