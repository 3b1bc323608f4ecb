"""The `byteloom` command. Commands of corpora and of runs, and --version, do not import models and engines.

Those take seconds to import, as they need torch.
"""

import os
import sys
from collections.abc import Callable
from functools import partial

import typer

from data_pipeline.errors import CorpusError
from launchers import imports
from launchers.cluster import ClusterError
from launchers.scheduler import SchedulerError
from pretrain import corpus_commands, run_commands, versions
from pretrain.console import run
from pretrain.run_folder import RunFolderError

COMPLETION = "_BYTELOOM_COMPLETE"
"""Set by the shell when it asks for completions."""
FAULTS = (ClusterError, CorpusError, RunFolderError, SchedulerError)


def main() -> None:
    """Runs the command."""
    with imports.for_good():
        command = _imported(_name())
    command()


def _name() -> str | None:
    """Return the name of the command. A shell that asks for completions has it in a variable, not in arguments."""
    completed = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
    words = completed.split() if COMPLETION in os.environ else sys.argv
    return words[1] if words[1:] else None


def _imported(name: str | None) -> Callable[[], object]:
    """Return what runs the command of a name, with what it needs imported and little else."""
    if name == "--version":
        return versions.print_versions
    if _has(corpus_commands.app, name):
        return partial(run, corpus_commands.app, FAULTS)
    if _has(run_commands.app, name):
        return partial(run, run_commands.app, FAULTS)
    from pretrain import cli  # noqa: PLC0415 - torch, models and engines

    return cli.main


def _has(app: typer.Typer, command: str | None) -> bool:
    return command in {registered.name for registered in app.registered_commands}


if __name__ == "__main__":
    main()
