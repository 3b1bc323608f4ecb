"""Runs of the real command with real MLflow: the embedded sqlite store, and servers that start later or die."""

import json
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.tracking import ParentRun, TrackingConfig
from pretrain.tracking.mlflow.store import MlflowStore
from tests import commands
from tests.conftest import Run, two_stages
from tests.mlflow_server import Server, client_of, make_store

STEPS = 12


def delivered(uri: str) -> tuple[Any, dict[str, list[tuple[int, float]]]]:
    """Return the only run of a store, and the (step, value) pairs of each of its journal metrics in order."""
    client = client_of(uri)
    experiment = client.get_experiment_by_name("byteloom")
    [run] = client.search_runs([experiment.experiment_id])
    metrics = {
        name: sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, name))
        for name in run.data.metrics
        if name != "starts"
    }
    return run, metrics


def journal(folder: Path) -> dict[str, list[tuple[int, float]]]:
    metrics: dict[str, list[tuple[int, float]]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name in record.keys() - {"step", "time"}:
            metrics.setdefault(name, []).append((record["step"], record[name]))
    return metrics


@pytest.mark.slow
def test_embedded_store_whose_maker_was_killed_is_made_again(tmp_path: Path):
    database = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(database)) as connection:
        for table in ("alembic_version (version_num)", "experiments (experiment_id)", "secrets (secret_id)"):
            connection.execute(f"CREATE TABLE {table}")
    assert MlflowStore(f"sqlite:///{database}").find_or_create_experiment("byteloom") == "1"


def test_embedded_store_holds_the_run_and_its_resumed_steps(byteloom: Run, recipe: Path):
    byteloom("train", recipe, "tracking.enabled=true")
    folder = recipe.parent / "runs/run"
    uri = f"sqlite:///{recipe.parent}/runs/mlflow.db"
    run, metrics = delivered(uri)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert run.data.params["model.patch_size"] == "4"
    assert run.data.params["train.steps"] == str(STEPS)
    assert int(run.data.params["parameters"]) > 1000
    assert len(run.data.tags["corpus.fingerprint"]) == 64
    assert run.data.tags["version.torch"].startswith("2.13")
    assert run.data.tags["recipe"] == str(recipe)
    assert metrics == journal(folder)

    byteloom("train", recipe, "tracking.enabled=true", "train.steps=16", "model.dropout=0.2")
    again, metrics = delivered(uri)
    assert again.info.run_id == run.info.run_id
    assert metrics == journal(folder)
    assert [step for step, _ in metrics["train/bits_per_byte"]] == list(range(1, 17))
    assert again.data.tags["start.1"].startswith("from the beginning: manual (")
    assert again.data.tags["start.2"].startswith("after step 12: manual (")
    changes = again.data.tags["start.2.changes"].split("; ")
    assert set(changes) == {"model.dropout: 0.1 -> 0.2", "train.steps: 12 -> 16"}
    assert again.data.tags["now.model.dropout"] == "0.2"
    assert again.data.tags["now.train.steps"] == "16"

    # An evaluation is an artifact. It succeeds if MLflow does not answer.
    byteloom("eval", folder)
    client = client_of(uri)
    place = "eval/step-00000016/library-validation-windows-128-separator"
    names = {Path(file.path).name for file in client.list_artifacts(run.info.run_id, place)}
    assert names == {"figures.json", "window-positions.csv", "patch-positions.csv", "positions.png"}
    state_file = (folder / "mlflow.json").read_text()
    (folder / "mlflow.json").write_text(state_file.replace(uri, "http://127.0.0.1:9"))
    output = byteloom("eval", folder / "checkpoints/step-00000016").stderr
    assert "MLflow at http://127.0.0.1:9: connection refused. The evaluation is not among the run's artifacts" in output
    (folder / "mlflow.json").write_text(state_file)

    # This is the state of a process that was killed after MLflow received steps 9 to 16, before it recorded that.
    state = json.loads((folder / "mlflow.json").read_text())
    assert state["delivered_step"] == state["sending_step"] == 16
    (folder / "mlflow.json").write_text(json.dumps(state | {"delivered_step": 8}))
    byteloom("track", folder)
    assert delivered(uri)[1] == metrics

    # A resume from an earlier checkpoint with another recipe computes other metrics, which are sent again.
    for step in (12, 16):
        shutil.rmtree(folder / f"checkpoints/step-{step:08d}")
    byteloom("train", recipe, "tracking.enabled=true", "optimizer.learning_rate=1e-3")
    _, metrics = delivered(uri)
    losses = metrics["train/bits_per_byte"]
    assert {step: value for step, value in losses if step <= 8}.items() <= dict(
        journal(folder)["train/bits_per_byte"]
    ).items()
    assert set(journal(folder)["train/bits_per_byte"]) <= set(losses)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.kill()


def test_server_that_starts_later_dies_and_returns_gets_every_step_once(byteloom: Run, recipe: Path, server: Server):
    """After a run without a server, `track` delivers. After a server dies during a run, the next start delivers.

    The model has two stages of patches, whose metrics arrive like all others.
    """
    tree = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump(tree | {"model": two_stages()}))
    tracked = ("tracking.enabled=true", f"tracking.uri={server.uri}")
    folder = recipe.parent / "runs/run"

    output = byteloom("train", recipe, *tracked).stderr
    assert f"MLflow at {server.uri}: connection refused. Training continues; the numbers are safe in" in output
    assert f"{STEPS + 1} steps did not reach MLflow" in output
    assert f"finished at step {STEPS}" in output
    assert byteloom("track", folder, check=False).returncode == 1

    server.start()
    assert f"{STEPS + 1} steps delivered" in byteloom("track", folder).stderr
    first, metrics = delivered(server.uri)
    assert first.info.status == "FINISHED"
    assert metrics == journal(folder)
    for name in ("patches/0/bytes_per_patch", "patches/1/positions_per_patch", "patches/1/ratio_loss"):
        assert [step for step, _ in metrics[name]] == list(range(1, STEPS + 1)), name

    endless = ["train", recipe, *tracked, "train.steps=100000", "validation.every=100000"]
    process = commands.start(endless, cwd=recipe.parent, stderr=subprocess.PIPE, text=True)
    progress = folder / "mlflow.json"
    while json.loads(progress.read_text())["delivered_step"] == STEPS:
        assert process.poll() is None
        time.sleep(0.05)
    server.kill()
    at_death = len((folder / "metrics.jsonl").read_text().splitlines())
    while len((folder / "metrics.jsonl").read_text().splitlines()) < at_death + 50:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, output = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT
    assert "with a checkpoint; the same command resumes from there" in output
    step = journal(folder)["train/bits_per_byte"][-1][0]

    server.start()
    output = byteloom("train", recipe, *tracked, f"train.steps={step + 5}", "validation.every=100000").stderr
    assert f"MLflow page of the run: {server.uri}/#/experiments/" in output
    last, metrics = delivered(server.uri)
    assert last.info.run_id == first.info.run_id
    assert last.info.status == "FINISHED"
    assert metrics["train/bits_per_byte"] == journal(folder)["train/bits_per_byte"]
    assert metrics == journal(folder)


def test_parent_run_ends_with_the_last_of_its_runs(byteloom: Run, recipe: Path):
    root = recipe.parent / "runs"
    make_store(root / "mlflow.db")
    parent = ParentRun(TrackingConfig(), root, "parent", "of two", 2, {})
    client = client_of(f"sqlite:///{root}/mlflow.db")

    def state() -> str:
        return str(client.get_run(parent.id).info.status)

    tracked = ("tracking.enabled=true", f"tracking.parent={parent.id}", "train.steps=4")
    byteloom("train", recipe, *tracked, "run.name=one")
    assert state() == "RUNNING"
    byteloom("train", recipe, *tracked, "run.name=two")
    assert state() == "FINISHED"
    byteloom("train", recipe, *tracked, "run.name=two", "train.steps=5", "data.shards=nowhere", check=False)
    assert state() == "FINISHED"  # the run was refused before it started
