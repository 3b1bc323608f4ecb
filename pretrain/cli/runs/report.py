"""The `report` command: one HTML page about runs."""

import time
from pathlib import Path
from typing import Annotated

import typer

from byteloom.core.storage.files import replace_file
from byteloom.core.text import count
from pretrain.cli.arguments import parse_path
from pretrain.report.page import page_of
from pretrain.report.run_data import read_run
from pretrain.terminal.console import say
from pretrain.training.run_status import find_runs

app = typer.Typer()


@app.command("report")
def report_command(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Runs, or folders of runs.", show_default=False, parser=parse_path),
    ],
    out: Annotated[Path, typer.Option(help="File to write.", parser=parse_path)] = Path("report.html"),
) -> None:
    """Write one HTML page about runs: loss, speed, events, recipe, corpora and evaluations.

    The page needs no network and no other file.
    """
    found = [read_run(path) for path in find_runs(runs, say)]
    replace_file(out, page_of(found, time.time()))
    say(f"{out} has the report of {count(len(found), 'run')}")
