"""`byteloom compare` on this machine: budgets, results and resumption."""

import csv
import io
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import commands
from tests.conftest import Run
from tests.slurm.cluster import wait_until

TRANSFORMER = {"family": "transformer", "sequence_length": 128, "width": 32, "layers": 1, "heads": 2}
WORDS = ("validation.every=1000", f"small:model={json.dumps(TRANSFORMER)}", "--name=both")


@pytest.fixture
def words(recipe: Path) -> list[str]:
    """Return a comparison of two families at 3,072 bytes, which is four steps of six rows of 128 bytes."""
    return [str(recipe), f"small={recipe}", *WORDS, "--bytes=3072"]


def starts(folder: Path) -> dict[str, str]:
    return {path.parent.name: path.read_text() for path in folder.glob("runs/both-*/generation")}


def test_comparison_trains_recipes_by_seeds_once_and_refuses_what_changed(
    byteloom: Run, words: list[str], recipe: Path
):
    compared = byteloom("compare", *words, "--json")
    tree = json.loads(compared.stdout)
    assert tree["budget"] == "--bytes 3072"
    assert {each["name"] for each in tree["recipes"]} == {"recipe", "small"}
    for each in tree["recipes"]:
        assert (each["steps"], each["bytes"], each["validation_loss"]["runs"]) == (4, 3072, 1)
        assert [(run["seed"], run["state"], run["step"]) for run in each["runs"]] == [(0, "finished", 4)]
    means = [each["validation_loss"]["mean"] for each in tree["recipes"]]
    assert means == sorted(means)
    folder = recipe.parent / "runs/both.compare"
    assert json.loads((folder / "results.json").read_text()) == tree
    assert '<h2 id="h-comparison">Comparison</h2>' in (folder / "report.html").read_text()

    before = starts(recipe.parent)
    again = byteloom("compare", *words, "--seeds=0,1", "--csv")
    assert "2 runs of 4 finished before" in again.stderr
    rows = list(csv.DictReader(io.StringIO(again.stdout)))
    assert len(rows) == 4 and {row["state"] for row in rows} == {"finished"}
    after = starts(recipe.parent)
    assert before.items() <= after.items() and len(after) == 4
    shown = byteloom("compare", *words, "--show").stdout.splitlines()
    assert [line.split()[0] for line in shown[2:4]] == [each["name"] for each in tree["recipes"]]

    other = [*words[:-1], "--bytes=6144"]
    assert "began with the budget --bytes 3072" in byteloom("compare", *other, check=False).stderr
    changed = byteloom("compare", *words, "small:optimizer.learning_rate=1e-4", check=False).stderr
    assert "recipe small has changed since" in changed and "optimizer.learning_rate: 0.003 -> 0.0001" in changed
    small = byteloom("compare", *words[:-1], "--bytes=100", "--name=tiny", check=False).stderr
    assert "recipe cannot fit the budget --bytes 100: one step takes 768 bytes" in small


def test_interrupted_comparison_saves_its_run_and_starts_no_other(byteloom: Run, words: list[str], recipe: Path):
    run = recipe.parent / "runs/both-recipe-seed-0"
    long = [word for word in words if not word.startswith("--bytes")] + ["--bytes=768000", "checkpoint.every=5"]
    process = commands.start(
        ["compare", *long], cwd=recipe.parent, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    journal = run / "metrics.jsonl"
    wait_until(lambda: process.poll() is not None or (journal.exists() and journal.stat().st_size > 9000), "steps", 120)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    step = last_step(run)
    assert 0 < step < 1000
    tree: dict[str, Any] = json.loads(byteloom("compare", *long, "--show", "--json").stdout)
    assert {run["state"] for each in tree["recipes"] for run in each["runs"]} == {"stopped", "waiting"}


def last_step(run: Path) -> int:
    return int(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"])


def test_time_is_a_budget_that_a_trial_turns_into_steps(byteloom: Run, words: list[str], recipe: Path):
    tree = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump(tree | {"validation": {}}))
    timed = byteloom("compare", recipe, "--seconds=2", "--name=timed", "--json")
    [found] = json.loads(timed.stdout)["recipes"]
    assert found["steps"] == max(1, round(2 / found["step_seconds"]))
    assert found["runs"][0]["state"] == "finished" and not (recipe.parent / "runs/timed.compare/trials").exists()
