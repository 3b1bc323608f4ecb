"""`engine.precision: auto` on machines with and without bf16 of their own, with the real command."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.emulation import WAYS, Emulation, is_slow


@pytest.fixture(params=WAYS)
def emulation(request: pytest.FixtureRequest) -> Emulation:
    if not is_slow(request.param):
        pytest.skip(f"with {request.param}, bf16 is as fast as without on this machine")
    return WAYS[request.param]


def train(emulation: Emulation, folder: Path, recipe: Path, *overrides: str) -> str:
    """Train under an emulation and return what the command said."""
    command = emulation.command("train", recipe, *overrides)
    done = subprocess.run(command, cwd=folder, env=emulation.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def precision_of(run: Path) -> str:
    return json.loads((run / "run.json").read_text())["precision"]


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_auto_is_fp32_where_bf16_is_emulated_and_a_resumed_run_keeps_its_precision(
    emulation: Emulation, tmp_path: Path, recipe: Path
):
    automatic = ("engine.precision=auto", "optimizer.schedule.warmup_steps=0")
    said = train(emulation, tmp_path, recipe, *automatic, "train.steps=2")
    assert "fp32 on cpu" in said
    assert precision_of(tmp_path / "runs/run") == "fp32"
    assert all(0 < record["mfu"] <= 1 for record in metrics_of(tmp_path / "runs/run") if "step_seconds" in record)

    explicit = ("run.name=explicit", *automatic)
    said = train(emulation, tmp_path, recipe, *explicit, "engine.precision=bf16", "train.steps=2")
    assert said.count("this machine emulates bf16: products are ") == 1
    assert not any("mfu" in record for record in metrics_of(tmp_path / "runs/explicit"))
    said = train(emulation, tmp_path, recipe, *explicit, "train.steps=3")
    assert "precision bf16 is kept from the run's earlier starts; fp32 would be faster here" in said
    assert precision_of(tmp_path / "runs/explicit") == "bf16"


def test_auto_takes_what_the_machine_has_and_a_run_keeps_it_without_a_record(
    byteloom: Run, tmp_path: Path, recipe: Path
):
    """A run of an older version has its precision in config.yaml alone."""
    no_warmup = "optimizer.schedule.warmup_steps=0"
    byteloom("train", recipe, "engine.precision=bf16", "train.steps=1", no_warmup)
    run = tmp_path / "runs/run"
    identity = json.loads((run / "run.json").read_text())
    del identity["precision"]
    (run / "run.json").write_text(json.dumps(identity))
    done = byteloom("train", recipe, "engine.precision=auto", "train.steps=2", "launch.processes=2", no_warmup)
    assert "bf16 on cpu" in done.stderr
    assert precision_of(run) == "bf16"
