"""MLflow's own page in a real browser: the text that a person sees of a run."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.mlflow_server import Server, client_of

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGE_MILLISECONDS = 60_000
"""Milliseconds of the page's own clock, which stops while it waits for the server."""

pytestmark = [pytest.mark.long, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path, store=tmp_path / "runs/mlflow.db")
    yield server
    server.kill()


def page_text(address: str, profile: Path) -> str:
    """Return the text that a browser shows for an address, without line breaks."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1500,1000",
        f"--user-data-dir={profile}", f"--virtual-time-budget={PAGE_MILLISECONDS}", "--dump-dom", address,
    ]  # fmt: skip
    page = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout
    page = re.sub(r"<(style|script).*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", page)))


@pytest.mark.timeout(900)
def test_mlflow_lists_runs_under_model_training_with_their_restarts(
    byteloom: Run, recipe: Path, tmp_path: Path, server: Server
):
    tracked = ("tracking.enabled=true", "run.name=weaver")
    byteloom("train", recipe, *tracked, "train.steps=2")
    byteloom("train", recipe, *tracked, "train.steps=3", "optimizer.clip_norm=0.5")
    [run] = runs_in(f"sqlite:///{server.store}")
    server.start()

    def page(place: str) -> str:
        experiment = f"{server.uri}/#/experiments/{run.info.experiment_id}"
        return page_text(experiment + place, tmp_path / "profile")

    training = page("?workflowType=machine_learning")
    assert " Run Name " in training
    assert " weaver " in training
    evaluations = page("/evaluation-runs")
    assert " Evaluation runs " in evaluations
    assert " weaver " not in evaluations
    assert " Training runs " in evaluations  # the page links to them

    overview = page(f"/runs/{run.info.run_id}?workflowType=machine_learning")
    assert "Start 2 continues after step 2: manual (20" in overview
    assert re.search(r"Parameters now: .*optimizer.clip_norm 0.5 \(at first 1.0\)", overview)
    assert re.search(r" starts 2 .*Parameters \(", overview)
    artifacts = page(f"/runs/{run.info.run_id}/artifacts?workflowType=machine_learning")
    assert " config.yaml train.log " in artifacts


def runs_in(uri: str) -> list[Any]:
    client = client_of(uri)
    experiment = client.get_experiment_by_name("byteloom")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))
