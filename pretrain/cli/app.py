"""The `byteloom` command, assembled from the commands of this folder."""

from typing import Annotated

import typer

from pretrain.cli import (
    checkpoints,
    config,
    conformance,
    corpora,
    evaluate,
    generate,
    inspection,
    models,
    runs,
    submit,
    sweep,
    tracking,
    train,
)
from pretrain.cli.arguments import MODELS_PANEL, RUNS_PANEL
from pretrain.cli.faults import FAULTS
from pretrain.cli.versions import print_versions
from pretrain.terminal.console import run

app = typer.Typer(
    name="byteloom",
    help="Pretrain models on raw bytes: turn files into shards, train, resume, evaluate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for group in (corpora, inspection, train, submit, sweep, runs, tracking, evaluate, generate):
    app.add_typer(group.app)
app.add_typer(checkpoints.app, name="checkpoint", rich_help_panel=RUNS_PANEL)
app.add_typer(models.app, name="models", rich_help_panel=MODELS_PANEL)
app.add_typer(config.app, name="config", rich_help_panel=MODELS_PANEL)
app.add_typer(conformance.app)


def _show_versions(wanted: bool) -> None:
    if wanted:
        print_versions()
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_versions,
            is_eager=True,
            help="Print the versions of Byteloom and its libraries.",
        ),
    ] = False,
) -> None:
    """Accept the options of `byteloom` itself."""


def main() -> None:
    """Run the command that the arguments name."""
    run(app, FAULTS)


if __name__ == "__main__":
    main()
