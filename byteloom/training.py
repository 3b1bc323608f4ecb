"""Train a run from Python code."""

import signal
import threading
from os import PathLike
from pathlib import Path
from typing import Any

from byteloom.overrides import as_overrides
from pretrain.cli.train import train_config
from pretrain.config.loading import find, load
from pretrain.terminal.console import logs_shown
from pretrain.training.run import TrainingError


def train(recipe: str | PathLike[str], **overrides: Any) -> Path:
    """Train a run, or resume it from its newest checkpoint, as `byteloom train` does.

    Progress and the log are written to standard error. SIGINT, SIGTERM and SIGUSR2 save and stop the run; before its
    first step they end the process. Call it from the main thread.

    Args:
        recipe: a name from `byteloom models`, such as debug, or a .yaml file.
        overrides: values by section: `train={"steps": 50}, run={"name": "first"}`.

    Returns:
        The run folder, once all steps are done.

    Raises:
        CorrectableError: the recipe is wrong, the run cannot start or continue, or the call is not in the main thread.
        KeyboardInterrupt: SIGINT stopped the run.
        SystemExit: another signal stopped it, or one of several ranks failed.
    """
    if threading.current_thread() is not threading.main_thread():
        raise TrainingError(
            "byteloom.train was called outside the main thread, and Python handles signals only there; call it from "
            "the main thread, or start `byteloom train` as a process"
        )
    path = find(str(recipe))
    config = load(path, as_overrides(overrides))
    with logs_shown():
        code = train_config(config, path)
    if code == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    if code:
        raise SystemExit(code)
    return Path(config.run.root) / config.run.name
