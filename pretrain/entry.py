"""Where the `byteloom` command begins. What makes corpora needs no torch, and what looks after runs no model; both take
seconds to import."""

import sys

import typer

from data_pipeline.errors import CorpusError
from launchers import imports
from launchers.cluster import ClusterError
from launchers.scheduler import SchedulerError
from pretrain import corpus_commands
from pretrain.console import run
from pretrain.run_folder import RunFolderError


def main() -> None:
    """Runs the command."""
    with imports.for_good():
        app = _app_with(sys.argv[1] if sys.argv[1:] else None)
    if app is None:
        with imports.for_good():
            from pretrain import cli  # noqa: PLC0415 - those libraries

        cli.main()
    else:
        run(app, (ClusterError, CorpusError, RunFolderError, SchedulerError))


def _app_with(command: str | None) -> typer.Typer | None:
    """Of those without a model."""
    if _has(corpus_commands.app, command):
        return corpus_commands.app
    from pretrain import run_commands  # noqa: PLC0415 - torch

    return run_commands.app if _has(run_commands.app, command) else None


def _has(app: typer.Typer, command: str | None) -> bool:
    return command in {registered.name for registered in app.registered_commands}


if __name__ == "__main__":
    main()
