"""Entry point of the `byteloom` command.

Commands of corpora and of runs, and --version, do not import models and engines, which take seconds to import. The
imports at the top of this file are fast, so that Ctrl-C finds `_quiet_interrupts` in place and prints no traceback.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from byteloom.core.packages import long_lived_imports

if TYPE_CHECKING:
    import typer

COMPLETION = "_BYTELOOM_COMPLETE"
"""Environment variable that a shell sets when it asks for completions."""


def main() -> None:
    """Run the command; report a failed import like its other errors."""
    with _quiet_interrupts(), long_lived_imports():
        from pretrain.terminal.console import run
    run(_command, ())


def _command() -> None:
    with _quiet_interrupts(), long_lived_imports():
        command = _imported(_name())
    command()


@contextmanager
def _quiet_interrupts() -> Iterator[None]:
    """Let Ctrl-C kill the process by the signal, without the traceback of an import."""
    earlier = signal.getsignal(signal.SIGINT)
    if earlier is not signal.default_int_handler:  # for example ignored
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, earlier)


def _name() -> str | None:
    """Return the name of the command. A shell that asks for completions sends it in a variable, not in arguments."""
    completed = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
    words = completed.split() if COMPLETION in os.environ else sys.argv
    return words[1] if words[1:] else None


def _imported(name: str | None) -> Callable[[], object]:
    """Return a function that runs a command, and import only what that command needs."""
    # ruff: noqa: PLC0415 - imports take seconds
    from data_pipeline.errors import CorpusError
    from launchers.slurm.presets import ClusterError
    from launchers.slurm.scheduler import SchedulerError
    from pretrain.cli import corpora, runs, versions
    from pretrain.terminal.console import run
    from pretrain.training.run_folder import RunFolderError

    if name == "--version":
        return versions.print_versions
    faults = (ClusterError, CorpusError, RunFolderError, SchedulerError)
    if _has(corpora.app, name):
        return partial(run, corpora.app, faults)
    if _has(runs.app, name):
        return partial(run, runs.app, faults)
    from pretrain.cli import app  # imports torch, models and engines

    return app.main


def _has(app: "typer.Typer", command: str | None) -> bool:
    return command in {registered.name for registered in app.registered_commands}


if __name__ == "__main__":
    main()
