"""The `health` command: bad batches of a run, and what the run did about them."""

from collections.abc import Sequence
from pathlib import Path

import typer

from byteloom.core.text import count
from pretrain.cli.arguments import RunFolderArgument
from pretrain.terminal.console import say
from pretrain.terminal.tables import JsonOption, Table, print_json, print_lines
from pretrain.training.health import HealthEvent, HealthLog
from pretrain.training.run_folder import RunFolder
from pretrain.training.run_status import check_run

app = typer.Typer()


@app.command("health")
def health_command(
    run: RunFolderArgument,
    as_json: JsonOption = False,
) -> None:
    """Show the bad batches of a run, with their documents and the actions."""
    check_run(run)
    events = HealthLog(RunFolder(run).health).read()
    if as_json:
        print_json([event.as_json() for event in events])
    elif events:
        rows_table(run, events).print()
        print_lines([f"{event.action}: {event.text}" for event in events])
    else:
        say(f"{run} has had no bad batch")


def rows_table(run: Path, events: Sequence[HealthEvent]) -> Table:
    """Return a table of the rows with the highest loss of each event, and their documents."""
    title = f"{run}: {count(len(events), 'event')}; rows with the highest loss"
    table = Table(title, ["step", "action", "row", "sequence", "bits/byte", "documents"], ["step", "row", "sequence"])
    for event in events:
        for row in event.rows:
            loss = "not finite" if row.bits_per_byte is None else f"{row.bits_per_byte:.3f}"
            documents = ", ".join(row.documents) or "(unknown)"
            table.add_row(str(event.step), event.action, str(row.row), f"{row.sequence:,}", loss, documents)
        if not event.rows:
            table.add_row(str(event.step), event.action)
    return table
