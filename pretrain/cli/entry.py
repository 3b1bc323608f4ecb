"""The `byteloom` command. Commands of corpora and of runs, and --version, do not import models and engines.

Those take seconds to import, as they need torch. The imports at the top of this file are quick, so that Ctrl-C meets
`_quiet_interrupts`, and no traceback.
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
"""Set by the shell when it asks for completions."""


def main() -> None:
    """Run the command; an import that fails is reported as its other errors are."""
    with _quiet_interrupts(), long_lived_imports():
        from pretrain.terminal.console import run
    run(_command, ())


def _command() -> None:
    with _quiet_interrupts(), long_lived_imports():
        command = _imported(_name())
    command()


@contextmanager
def _quiet_interrupts() -> Iterator[None]:
    """Have Ctrl-C end the process by the signal, without the traceback of an import."""
    earlier = signal.getsignal(signal.SIGINT)
    if earlier is not signal.default_int_handler:  # it is ignored, for one
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, earlier)


def _name() -> str | None:
    """Return the name of the command. A shell that asks for completions has it in a variable, not in arguments."""
    completed = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
    words = completed.split() if COMPLETION in os.environ else sys.argv
    return words[1] if words[1:] else None


def _imported(name: str | None) -> Callable[[], object]:
    """Return what runs the command of a name, with what it needs imported and little else."""
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
