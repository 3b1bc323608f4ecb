"""`engine.precision: auto` on machines with and without native bf16, with the real command."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import commands
from tests.conftest import Run
from tests.emulation import EMULATIONS, NO_ONEDNN, OLDER, is_slow

Train = Callable[..., str]


@pytest.fixture(params=[OLDER, pytest.param(NO_ONEDNN, marks=pytest.mark.long)])
def train(request: pytest.FixtureRequest, tmp_path: Path, recipe: Path) -> Iterator[Train]:
    """Return a function that trains under an emulation and returns the output of the command."""
    if not is_slow(request.param):
        pytest.skip(f"bf16 is not slow under {request.param} on this machine")
    emulation = EMULATIONS[request.param]
    env = emulation.environment()

    def run(*overrides: str) -> str:
        words = ("train", recipe, *overrides)
        done = commands.run(words, env=env, server=server, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stderr

    with commands.warm(env, preamble=emulation.preamble) as server:
        yield run


def precision_of(run: Path) -> str:
    return json.loads((run / "run.json").read_text())["precision"]


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_auto_is_fp32_under_emulated_bf16_and_a_resumed_run_keeps_its_precision(train: Train, tmp_path: Path):
    automatic = ("engine.precision=auto", "optimizer.schedule.warmup_steps=0")
    output = train(*automatic, "train.steps=2")
    assert "fp32 on cpu" in output
    assert precision_of(tmp_path / "runs/run") == "fp32"
    assert all(0 < record["mfu"] <= 1 for record in metrics_of(tmp_path / "runs/run") if "step_seconds" in record)

    explicit = ("run.name=explicit", *automatic)
    output = train(*explicit, "engine.precision=bf16", "train.steps=2")
    assert output.count("this machine emulates bf16: products are ") == 1
    assert not any("mfu" in record for record in metrics_of(tmp_path / "runs/explicit"))
    output = train(*explicit, "train.steps=3")
    assert "precision bf16 is kept from the run's earlier starts; fp32 would be faster here" in output
    assert precision_of(tmp_path / "runs/explicit") == "bf16"


def test_run_without_recorded_precision_keeps_that_of_its_config(byteloom: Run, tmp_path: Path, recipe: Path):
    """A run of an older version has its precision only in config.yaml."""
    no_warmup = "optimizer.schedule.warmup_steps=0"
    byteloom("train", recipe, "engine.precision=bf16", "train.steps=1", no_warmup)
    run = tmp_path / "runs/run"
    identity = json.loads((run / "run.json").read_text())
    del identity["precision"]
    (run / "run.json").write_text(json.dumps(identity))
    done = byteloom("train", recipe, "engine.precision=auto", "train.steps=2", "launch.processes=2", no_warmup)
    assert "bf16 on cpu" in done.stderr
    assert precision_of(run) == "bf16"
