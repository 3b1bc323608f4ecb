"""The commands that look after runs: how they fare, what they say, and their end."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launchers import scheduler
from launchers.record import last_submission
from launchers.scheduler import Phase
from pretrain import argument_types as types
from pretrain.console import printable, say
from pretrain.progress import duration, size
from pretrain.run_folder import RunFolder, RunFolderError
from pretrain.run_status import RunStatus, check_run, find_runs, status_of, statuses_of

POLL_SECONDS = 0.2
STATE_SECONDS = 2.0
"""Between two questions whether a run that is followed goes on."""
IN_THE_QUEUE = {phase for phase in Phase if phase.is_alive}

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False, parser=types.path)]


@app.command("status")
def status_command(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RUN]...", help="Runs, or folders of runs; runs/ when left out.", parser=types.path),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All that is known, for programs.")] = False,
) -> None:
    """Say how runs fare: in the queue, running, stopped or finished, how far they are, and why they were restarted."""
    found = statuses_of(find_runs(runs or [Path("runs")]))
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in found], indent=1))
    else:
        Console().print(_table(found))
        for each in found:
            for remark in filter(None, (_remark(each), *each.problems)):
                typer.echo(printable(f"{Path(each.run).name}: {remark}"))


@app.command("logs")
def logs_command(
    run: RunPath,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run is over.")] = False,
    rank: Annotated[int, typer.Option(min=0, help="Whose log.")] = 0,
) -> None:
    """Print what a rank of a run has said, through all its starts."""
    check_run(run)
    log = RunFolder(run).log_of(rank)
    submission = last_submission(run)
    if not log.exists() and submission is not None and not follow:
        log = submission / "ranks" / f"rank-{rank:05d}.log"  # it has not come to train
    if not log.exists() and not follow:
        raise RunFolderError(f"{log} does not exist: rank {rank} has said nothing yet, or there is no such rank")
    with suppress(BrokenPipeError, KeyboardInterrupt):  # whoever reads has had enough
        for piece in _pieces(run, log, follow):
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()


@app.command("cancel")
def cancel_command(run: RunPath) -> None:
    """End a run: take its job out of the queue, or ask its processes to stop, which save a checkpoint first."""
    status = status_of(run)
    if status.process is not None:
        os.kill(status.process, signal.SIGTERM)
        say(f"{run} was asked to stop: process {status.process}")
    elif status.job is not None and status.state in IN_THE_QUEUE:
        scheduler.cancel(status.job)
        say(f"{run} was cancelled: job {status.job}")
    else:
        elsewhere = status.state == Phase.RUNNING
        why = (
            f"cancel it on {status.nodes or 'the machine that trains it'}"
            if elsewhere
            else status.reason or "there is nothing to cancel"
        )
        raise RunFolderError(f"{run} is {status.state}: {why}")


def _table(found: list[RunStatus]) -> Table:
    """Fits a terminal of 80 columns."""
    table = Table(box=None, pad_edge=False)
    for name in ("run", "state", "step", "bits/byte", "bytes/s", "left", "checkpoint", "restarts"):
        numeric = name in ("step", "bits/byte", "bytes/s", "left", "restarts")
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for each in found:
        age = None if each.checkpoint_seconds is None else duration(each.checkpoint_seconds)
        table.add_row(
            escape(printable(Path(each.run).name)),
            each.state,
            f"{each.step}/{each.steps or '?'}",
            "" if each.bits_per_byte is None else f"{each.bits_per_byte:.4f}",
            "" if each.bytes_per_second is None else size(each.bytes_per_second),
            "" if each.seconds_left is None else duration(each.seconds_left),
            f"{each.checkpoint_step} ({age})" if age else "",
            str(each.restarts),
        )
    return table


def _remark(status: RunStatus) -> str:
    """What else there is to say of a run, in a line; empty if there is nothing."""
    where = f" on {status.nodes}" if status.nodes else ""
    job = f"job {status.job}{where}" if status.job else ""
    return "; ".join(filter(None, (job, status.reason, status.why)))


def _pieces(run: Path, log: Path, follow: bool) -> Iterator[bytes]:
    """What a log holds; with `follow`, what comes after too, until the run is over."""
    offset, looked, is_over = 0, float("-inf"), not follow
    while True:
        if log.exists():
            with log.open("rb") as file:
                file.seek(offset)
                while piece := file.read(1 << 16):
                    offset += len(piece)
                    yield piece
        if is_over:
            return
        if time.monotonic() - looked > STATE_SECONDS:  # what was said before it was over is still to be read
            looked = time.monotonic()
            is_over = status_of(run).state not in (*IN_THE_QUEUE, Phase.UNKNOWN)
        if not is_over:
            time.sleep(POLL_SECONDS)
