"""The commands `status`, `logs` and `cancel`."""

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from byteloom.core.text import count
from launchers.slurm import scheduler
from launchers.slurm.scheduler import JobPhase
from launchers.supervision.record import last_submission
from launchers.supervision.slow_ranks import SlowRank, describe_slow_ranks
from pretrain.cli.arguments import RunFolderArgument, parse_path
from pretrain.terminal.console import say
from pretrain.terminal.losses import BITS_PER_BYTE, unit_of
from pretrain.terminal.patches import overflow_remarks
from pretrain.terminal.progress import duration, size
from pretrain.terminal.tables import JsonOption, Table, print_json, print_lines
from pretrain.training.ancestry import Ancestor, describe_ancestry
from pretrain.training.run_folder import Rollback, RunFolder, RunFolderError
from pretrain.training.run_status import RunStatus, check_run, find_runs, status_of, statuses_of

LOG_POLL_SECONDS = 0.2
STATE_SECONDS = 2.0
"""Seconds between two checks whether a followed run has ended."""
IN_THE_QUEUE = {phase for phase in JobPhase if phase.is_alive}

app = typer.Typer(pretty_exceptions_enable=False)


@app.command("status")
def status_command(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN", help="Runs, or folders of runs. Default: runs.", parser=parse_path),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the state, progress and restarts of runs."""
    found = statuses_of(find_runs(runs or [Path("runs")], say))
    if as_json:
        print_json([asdict(each) for each in found])
    else:
        status_table(found).print()
        print_lines(
            [
                f"{Path(each.run).name}: {remark}"
                for each in found
                for remark in filter(None, (status_remark(each), *overflow_remarks(each.patches), *each.problems))
            ]
        )


@app.command("logs")
def logs_command(
    run: RunFolderArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print new lines until the run ends.")] = False,
    rank: Annotated[int, typer.Option(min=0, help="Rank of the log.")] = 0,
) -> None:
    """Print the log of one rank of a run."""
    check_run(run)
    log = RunFolder(run).log_of(rank)
    submission = last_submission(run)
    if not log.exists() and submission is not None and not follow:
        log = submission / "ranks" / f"rank-{rank:05d}.log"  # the rank has not started to train
    if not log.exists() and not follow:
        raise RunFolderError(f"{log} does not exist: rank {rank} has logged nothing yet, or the run has no such rank")
    with suppress(BrokenPipeError, KeyboardInterrupt):  # the reader closed the pipe or pressed Ctrl-C
        for piece in _pieces(run, log, follow):
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()


@app.command("cancel")
def cancel_command(run: RunFolderArgument) -> None:
    """Stop a run.

    Cancels its job, or asks its processes to save a checkpoint and stop.
    """
    status = status_of(run)
    if status.process is not None:
        os.kill(status.process, signal.SIGTERM)
        say(f"{run} is asked to stop: SIGTERM was sent to process {status.process}")
    elif status.job is not None and status.state in IN_THE_QUEUE:
        scheduler.cancel(status.job)
        say(f"{run}: job {status.job} is cancelled")
    else:
        elsewhere = status.state == JobPhase.RUNNING
        why = (
            f"run this command on {status.nodes or 'the machine that trains it'}"
            if elsewhere
            else status.reason or "there is nothing to cancel"
        )
        raise RunFolderError(f"{run} is {status.state}: {why}")


def status_table(found: Sequence[RunStatus]) -> Table:
    """Return a table with a row for each run, without columns that are empty for all runs."""
    rows = [
        {
            "run": Path(each.run).name,
            "state": each.state,
            "step": f"{each.step}/{each.steps or '?'}",
            "bits/byte": _bits(each.bits_per_byte),
            "validation": _bits(each.validation_bits_per_byte),
            "loss": _other_loss(each, each.loss),
            "validation loss": _other_loss(each, each.validation_loss),
            "bytes/patch": ", ".join(f"{own['bytes_per_patch']:.2f}" for own in each.patches.values()),
            "bytes/s": "" if each.bytes_per_second is None else size(each.bytes_per_second),
            "left": "" if each.seconds_left is None else duration(each.seconds_left),
            "checkpoint": _checkpoint(each),
        }
        for each in found
    ]
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    table = Table("", columns, numbers=[name for name in columns if name not in ("run", "state", "checkpoint")])
    for row in rows:
        table.add_row(*(row[name] for name in columns))
    return table


def _other_loss(status: RunStatus, value: float | None) -> str:
    """Return a loss of an objective other than causal, with its unit."""
    return "" if value is None or status.metric == BITS_PER_BYTE else f"{value:.4f} {unit_of(status.metric)}"


def _bits(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _checkpoint(status: RunStatus) -> str:
    if status.checkpoint_step is None:
        return ""
    age = "" if status.checkpoint_seconds is None else f" ({duration(status.checkpoint_seconds)})"
    return f"{status.checkpoint_step}{age}"


def status_remark(status: RunStatus) -> str:
    """Return a line about a run that adds to the table: its job, starts, and reason of its end."""
    where = f" on {status.nodes}" if status.nodes else ""
    job = f"job {status.job}{where}" if status.job else ""
    process = f"process {status.process}{where}" if status.process and not status.job else ""
    starts = count(status.starts, "start") if status.starts + status.restarts > 1 else ""
    restarts = count(status.restarts, "automatic restart") if status.restarts else ""
    ancestry = describe_ancestry([Ancestor.model_validate(each) for each in status.ancestry])
    rollback = str(Rollback.model_validate(status.rollbacks[-1])) if status.rollbacks else ""
    reads = "; ".join(f"{name}: {each['text']}" for name, each in status.coverage.items() if each["leaves_out"])
    slow = "; ".join(describe_slow_ranks([SlowRank(**each) for each in status.slow_ranks]).values())
    return "; ".join(
        filter(None, (job, process, slow, ancestry, reads, starts, restarts, status.reason, status.why, rollback))
    )


def _pieces(run: Path, log: Path, follow: bool) -> Iterator[bytes]:
    """Yield the bytes of a log; with `follow`, also those written until the run ends."""
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
        if time.monotonic() - looked > STATE_SECONDS:  # then read once more
            looked = time.monotonic()
            is_over = status_of(run).state not in (*IN_THE_QUEUE, JobPhase.UNKNOWN)
        if not is_over:
            time.sleep(LOG_POLL_SECONDS)
