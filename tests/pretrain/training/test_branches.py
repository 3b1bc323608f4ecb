"""Branches: new runs that continue a checkpoint of another run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from pretrain.checkpoint import read_metadata
from pretrain.training.run_status import status_of
from tests.commands import run_here
from tests.conftest import recipe_tree
from tests.distributed.parity import content

EXACT = ("train/bits_per_byte", "validation/bits_per_byte", "gradient_norm", "learning_rate", "epoch")
"""Numbers that are equal bit for bit in equal runs."""
NOTE = "mlflow.note.content"
"""Tag of the description of a run, which lists all starts."""
STEPS = 8
CONSTANT = {"shape": "constant", "warmup_steps": 0}


def write_branch_recipe(folder: Path, corpus_folder: Path, **checkpoint: Any) -> Path:
    tree: Any = recipe_tree(corpus_folder)
    tree["run"]["root"] = str(folder / "runs")
    tree["train"]["steps"] = STEPS
    tree["validation"]["every"] = 4
    tree["optimizer"]["schedule"] = CONSTANT
    tree["checkpoint"] = {"every": 2, "keep": None, **checkpoint}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def run_well(*arguments: object) -> str:
    """Run a command in this process, which must succeed; return its output."""
    code, output = run_here(*arguments)
    assert code == 0, output
    return output


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return the content and the time of change of each file of a folder."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def numbers(run: Path, after: int = 0) -> dict[int, dict[str, float]]:
    """Return the exact numbers of each step after one."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({record["step"] for record in records}) == len(records)
    return {r["step"]: {name: r[name] for name in EXACT if name in r} for r in records if r["step"] > after}


def state(run: Path, step: int) -> dict[str, Any]:
    return read_metadata(run / f"checkpoints/step-{step:08d}").state


@pytest.fixture(autouse=True)
def _log_all(caplog: pytest.LogCaptureFixture) -> None:
    """Let train.log receive all lines, as the real command does."""
    caplog.set_level("INFO", "pretrain")


@pytest.fixture(scope="module")
def parent(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run with a checkpoint of every second step, which tests only read."""
    folder = tmp_path_factory.mktemp("parent")
    run_well("train", write_branch_recipe(folder, corpus_folder))
    return folder / "runs/run"


@pytest.fixture
def branch(parent: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that makes a branch in the test's folder and returns its run folder."""

    def make(name: str, step: int = 4, *overrides: str, run: Path = parent) -> Path:
        run_well("branch", run, "--step", step, "--name", name, f"run.root={tmp_path}", *overrides)
        return tmp_path / name

    return make


@pytest.mark.slow
def test_branch_without_overrides_equals_its_parent_bit_for_bit(parent: Path, branch: Callable[..., Path]):
    before = files_of(parent)
    run = branch("same")
    first = state(run, 4)
    assert first["reading"] == state(parent, 4)["reading"] and first["counters"] == state(parent, 4)["counters"]
    output = run_well("train", run / "config.yaml")
    assert numbers(run) == numbers(parent, after=4)
    last = f"checkpoints/step-{STEPS:08d}"
    assert content(run / last) == content(parent / last)
    assert files_of(parent) == before
    assert state(run, STEPS)["reading"] == state(parent, STEPS)["reading"]
    assert state(run, STEPS)["run"] != state(parent, STEPS)["run"], output


@pytest.mark.slow
def test_ancestry_is_in_every_place_and_the_record_proves_the_whole_way(parent: Path, branch: Callable[..., Path]):
    first = branch("first")
    run_well("train", first / "config.yaml", "train.steps=6")
    second = branch("second", 6, "train.steps=7", run=first)
    status = status_of(second)
    assert (status.step, status.steps, status.checkpoint_step, status.state) == (6, 7, 6, "stopped")
    run_well("train", second / "config.yaml")
    ancestry = json.loads((second / "run.json").read_text())["ancestry"]
    assert [(each["name"], each["step"]) for each in ancestry] == [("run", 4), ("first", 6)]
    assert [each["run"] for each in ancestry] == [state(parent, 4)["run"], state(first, 6)["run"]]
    assert ancestry[1]["changes"] == ["train.steps: 6 -> 7"]
    assert state(second, 6)["ancestry"] == state(second, 7)["ancestry"] == ancestry
    described = "branch of first at step 6, a branch of run at step 4"
    assert described in run_well("status", second)
    assert described in run_well("checkpoint", "list", second)
    assert described in run_well("checkpoint", "show", second)
    assert described in (second / "train.log").read_text()
    assert json.loads(run_well("status", "--json", second))[0]["ancestry"] == ancestry
    assert (
        f"until step 7: 42 sequences of 128 bytes, digest {state(second, 7)['reading']['digest']}; it is a {described}"
        in (run_well("inspect", "--replay", second))
    )
    rows = {step: json.loads(run_well("inspect", second, "--step", step, "--json"))["row"] for step in (3, 5, 7)}
    assert [rows[step].get("ancestor") for step in rows] == ["run", "first", None]
    whole = json.loads(run_well("inspect", parent, "--step", 7, "--json"))["row"]
    assert rows[7]["origins"] == whole["origins"]
    assert "read as run first, which this run continues" in run_well("inspect", second, "--step", 5)


@pytest.mark.slow
def test_branch_may_change_the_schedule_is_resumed_by_another_engine_and_submitted(branch: Callable[..., Path]):
    decay = ("optimizer.schedule.shape=wsd", "optimizer.schedule.decay_steps=4", "train.global_batch=4")
    run = branch("decay", 4, *decay)
    tree: Any = yaml.safe_load((run / "config.yaml").read_text())
    assert tree["optimizer"]["schedule"]["decay_fraction"] is None
    run_well("train", run / "config.yaml", "train.steps=8", "checkpoint.every=1", "profile.start=null")
    rates = [3e-3 * share for share in (1, 0.75, 0.5, 0.25)]
    assert [each["learning_rate"] for each in numbers(run).values()] == pytest.approx(rates)
    assert state(run, STEPS)["reading"]["batches"] == [[0, 0, 6], [4, 24, 4]]
    assert "different from run: optimizer.schedule.shape: constant -> wsd" in (run / "train.log").read_text()

    moved = branch("moved", 4, *decay)
    run_well("train", moved / "config.yaml", "engine.name=fsdp")
    losses = [[each["train/bits_per_byte"] for each in numbers(each_run).values()] for each_run in (run, moved)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    code, output = run_here("submit", run, "--cluster", "local", "--dry-run")
    assert code == 0 and "name: decay" in output, output


REFUSED = {
    "model": (["model.activation=gelu"], "model.activation: relu -> gelu"),
    "optimizer": (["optimizer.name=adam"], "optimizer.name must be adamw, not adam"),
    "scaling": (["optimizer.scaling=mup", "optimizer.base={dropout: 0.1}"], "optimizer.scaling: standard -> mup"),
    "data": (["data.seed=5"], "data.seed: 0 -> 5"),
    "length": (["train.steps=4"], "train.steps (4) must be more than 4"),
    "name": (["run.name=x"], "--name gives the name of a branch"),
    "unknown": (["optimizer.shedule=1"], "did you mean schedule"),
    "two lengths": (
        ["optimizer.schedule.decay_steps=2", "optimizer.schedule.decay_fraction=0.5"],
        "decay_steps (2) and decay_fraction (0.5)",
    ),
}


@pytest.mark.parametrize(("overrides", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_changes_the_function_is_refused_by_name(parent: Path, tmp_path: Path, overrides: list[str], message: str):
    before = files_of(parent)
    code, output = run_here("branch", parent, "--step", 4, "--name", "new", f"run.root={tmp_path}", *overrides)
    assert code == 1 and message in output, output
    assert files_of(parent) == before and not (tmp_path / "new").exists()


def test_missing_step_and_taken_name_are_refused(parent: Path, branch: Callable[..., Path], tmp_path: Path):
    code, output = run_here("branch", parent, "--step", 5, "--name", "new")
    assert code == 1 and "has no checkpoint of step 5; it has those of steps 2, 4, 6, 8" in output, output
    run = branch("taken")
    before = files_of(run)
    code, output = run_here("branch", parent, "--step", 6, "--name", "taken", f"run.root={tmp_path}")
    assert code == 1 and f"{run} exists already; choose another --name" in output, output
    assert files_of(run) == before


def test_damaged_parent_makes_no_branch_and_the_name_stays_free(
    corpus_folder: Path, parent: Path, branch: Callable[..., Path], tmp_path: Path
):
    run = branch("whole")
    data = run / "checkpoints/step-00000004/rank-00000.bin"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    code, output = run_here("branch", run, "--step", 4, "--name", "new")
    assert code == 1 and "rank-00000.bin is damaged between bytes" in output, output
    assert list((tmp_path / "new/checkpoints").iterdir()) == []
    assert branch("new").is_dir()


def test_branch_that_lost_its_checkpoint_does_not_begin_with_first_values(branch: Callable[..., Path]):
    run = branch("lost")
    (run / "checkpoints/step-00000004").rename(run / "elsewhere")
    code, output = run_here("train", run / "config.yaml")
    assert code == 1 and "is a branch of run at step 4, and has no checkpoint" in output, output


@pytest.mark.slow
def test_branch_at_a_url_continues_a_run_that_has_no_folder_here(corpus_folder: Path, tmp_path: Path):
    home = "memory://branches"
    run_well("train", write_branch_recipe(tmp_path, corpus_folder, home=home), "validation.shards=null")
    (tmp_path / "runs/run").rename(tmp_path / "gone")
    run_well("branch", f"{home}/run", "--step", 4, "--name", "new", "train.steps=6")
    new = tmp_path / "runs/new"
    assert not (new / "checkpoints").exists()
    code, output = run_here("branch", f"{home}/run", "--step", 4, "--name", "new", f"run.root={tmp_path}/other")
    assert code == 1 and f"{home}/new belongs to run " in output, output
    run_well("train", new / "config.yaml")
    assert numbers(new) == {step: numbers(tmp_path / "gone")[step] for step in (5, 6)}
    (new / "run.json").rename(tmp_path / "run.json")
    (new / "metrics.jsonl").unlink()
    run_well("train", new / "config.yaml", "train.steps=8")
    assert numbers(new) == numbers(tmp_path / "gone", after=6)
    assert json.loads((new / "run.json").read_text()) == json.loads((tmp_path / "run.json").read_text())


@pytest.mark.slow
def test_mlflow_shows_a_branch_under_its_parent_and_a_rollback_once(corpus_folder: Path, tmp_path: Path):
    recipe = write_branch_recipe(tmp_path, corpus_folder)
    tracked = ("tracking.enabled=true", "validation.shards=null")
    run_well("train", recipe, *tracked, "train.steps=4")
    run_well("branch", tmp_path / "runs/run", "--step", 2, "--name", "new", "optimizer.learning_rate=1e-3")
    new = tmp_path / "runs/new"
    run_well("train", new / "config.yaml")
    run_well("checkpoint", "rollback", new, 2, "--reason", "a test")
    run_well("train", new / "config.yaml")
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    [experiment] = [each.experiment_id for each in client.search_experiments() if each.name == "byteloom"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert runs.keys() == {"run", "new"}
    tags = runs["new"].data.tags
    assert tags["mlflow.parentRunId"] == runs["run"].info.run_id
    assert (tags["branch.of"], tags["branch.step"]) == ("run", "2")
    assert tags["branch.changes"] == "optimizer.learning_rate: 0.003 -> 0.001"
    history = client.get_metric_history(runs["new"].info.run_id, "train/bits_per_byte")
    assert sorted((each.step, each.value) for each in history) == [
        (step, each["train/bits_per_byte"]) for step, each in numbers(new).items()
    ]
    starts = [tag for tag, text in tags.items() if "rolled back from step 4 to step 2: a test" in text and tag != NOTE]
    assert starts == ["start.3"]
    assert [each.step for each in client.get_metric_history(runs["new"].info.run_id, "starts")] == [2, 2]
