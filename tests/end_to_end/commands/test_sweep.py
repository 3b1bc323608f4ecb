"""Sweeps on this machine; tests/slurm/test_arrays.py runs one on a cluster."""

import json
from pathlib import Path

import pytest

from pretrain.cli.runs.sweep import grid
from pretrain.config.errors import ConfigError
from tests.conftest import Run


def test_grid_has_one_run_per_combination_of_values():
    points = grid(["a.lr=1e-3,3e-4", "b.betas=[0.9,0.95],[0.9,0.99]", "c.x=1", "d.lr=2,3"])
    assert len(points) == 8
    assert next(iter(points.values())) == ["a.lr=1e-3", "b.betas=[0.9,0.95]", "c.x=1", "d.lr=2"]
    assert next(iter(points)) == "a.lr-1e-3-betas-0.9_0.95-d.lr-2"


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["a.b=1"], "there is one combination only"),
        (["a.b=1,2", "a.b=3"], "given twice"),
        (["a.b"], "not of the form"),
        (["a.b=x/y,x_y"], "two runs of the sweep would have the same name"),
    ],
)
def test_invalid_grid_is_refused(overrides: list[str], fault: str):
    with pytest.raises(ConfigError, match=fault):
        grid(overrides)


def test_runs_of_a_sweep_are_trained_in_order(byteloom: Run, recipe: Path, corpus_folder: Path):
    swept = byteloom("sweep", recipe, f"data.shards={corpus_folder}/train,nowhere", "train.steps=4", check=False)
    names = [line.partition(": ")[2] for line in swept.stderr.splitlines() if " of 2: " in line]
    assert len(names) == 2
    assert f"{names[0]}: finished at step 4" in swept.stderr
    assert "error: there is no corpus at nowhere: no such folder" in swept.stderr
    assert f"error: {names[1]} failed; the same command resumes it" in swept.stderr
    assert swept.returncode == 1
    source = recipe.parent / "runs" / names[0] / "config.source.json"
    assert json.loads(source.read_text())["recipe"] == str(recipe)
