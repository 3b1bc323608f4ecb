"""The `byteloom` command, assembled from the commands of this folder."""

from typing import Annotated

import typer

from pretrain.cli import (
    checkpoints,
    config,
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
from pretrain.cli.faults import FAULTS
from pretrain.cli.versions import print_versions
from pretrain.terminal.console import run

app = typer.Typer(
    name="byteloom",
    help="Pretrain models on raw bytes: files to shards, shards to a model, checkpoints that resume to the byte.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for each in (corpora, inspection, train, submit, sweep, runs, tracking, evaluate, generate):
    app.add_typer(each.app)
app.add_typer(models.app, name="models")
app.add_typer(checkpoints.app, name="checkpoint")
app.add_typer(config.app, name="config")


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
            help="Print the versions of Byteloom, Python, torch, DeepSpeed and the accelerator.",
        ),
    ] = False,
) -> None:
    """Take the options that belong to no command."""


def main() -> None:
    """Runs a command."""
    run(app, FAULTS)


if __name__ == "__main__":
    main()
