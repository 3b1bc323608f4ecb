"""Processes of a set of runs, and trials of its recipes."""

import signal
from pathlib import Path

import pytest

from pretrain.cli.runs import run_set
from pretrain.cli.runs.compare import TRIAL
from pretrain.config.loading import load


def test_ctrl_c_at_any_moment_starts_no_other_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_set, "BYTELOOM_COMMAND", ["true"])
    monkeypatch.setattr(run_set, "POLL_SECONDS", 0.01)
    recipes = {name: tmp_path / f"{name}.yaml" for name in ("first", "second")}
    codes = run_set.train_all(recipes, 1, lambda name: signal.raise_signal(signal.SIGINT))
    assert codes == {"first": 0}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert run_set.train_all(recipes, 1) == {"first": 0, "second": 0}


def test_request_to_stop_reaches_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A scheduler or `kill` sends SIGTERM to this process alone. The recipe is a script here, which waits for it."""
    script = tmp_path / "first"
    script.write_text("#!/bin/sh\ntrap 'exit 143' TERM\nkill -TERM $PPID\nwhile :; do sleep 0.01; done\n")
    script.chmod(0o755)
    monkeypatch.setattr(run_set, "BYTELOOM_COMMAND", ["sh", "-c", 'exec "$1"'])
    monkeypatch.setattr(run_set, "POLL_SECONDS", 0.01)
    recipes = {"first": script, "second": tmp_path / "second"}
    assert run_set.train_all(recipes, 1) == {"first": 143}
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_trial_has_no_samples_no_validation_and_no_trackers():
    observed = ["checkpoint.every=9", "samples.every=18", "tracking.trackers.tensorboard={}", "validation.every=5"]
    config = load("debug", [*observed, *TRIAL])
    assert (config.samples.every, config.tracking.trackers, config.tracking.enabled) == (0, {}, False)
    assert not config.validation.by_name() and not config.callbacks
