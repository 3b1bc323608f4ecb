"""Sweeps on this machine; tests/slurm/test_arrays.py runs one on a cluster."""

import json
from pathlib import Path

from tests.conftest import Run


def test_runs_of_a_sweep_are_trained_in_order(byteloom: Run, recipe: Path, corpus_folder: Path):
    swept = byteloom("sweep", recipe, f"data.shards={corpus_folder}/train,nowhere", "train.steps=4", check=False)
    names = [line.partition(": ")[2] for line in swept.stderr.splitlines() if " of 2: " in line]
    assert len(names) == 2
    assert f"{names[0]}: finished at step 4" in swept.stderr
    assert "error: there is no corpus at nowhere: no such folder" in swept.stderr
    assert f"error: {names[1]} failed; the same command resumes it" in swept.stderr
    assert swept.returncode == 1
    header, _, first, second = swept.stdout.splitlines()
    assert header.split() == ["run", "validation", "training", "step", "time", "state"]
    assert (first.split()[0], first.split()[-1]) == (names[0], "finished")
    assert (second.split()[0], second.split()[-1]) == (names[1], "waiting")
    source = recipe.parent / "runs" / names[0] / "config.source.json"
    assert json.loads(source.read_text())["recipe"] == str(recipe)


def test_sweep_of_several_recipes_names_runs_by_recipe_and_skips_finished_runs(byteloom: Run, recipe: Path):
    other = recipe.with_name("other.yaml")
    other.write_text(recipe.read_text().replace("name: run", "name: other"))
    words = ("sweep", recipe, other, "train.steps=2", "validation.every=9", "--name=pair")
    swept = byteloom(*words)
    assert {line.split()[0] for line in swept.stdout.splitlines()[2:]} == {"run", "other"}
    assert "2 runs of 2 finished before" in byteloom(*words).stderr
    assert (recipe.parent / "runs/run/generation").read_text().split()[0] == "1"
    assert "there is one combination only" in byteloom("sweep", recipe, check=False).stderr
