"""The `check-family` command: the laws of model families, checked on one of them."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from pretrain.conformance import LAWS, BrokenLawError, Law, Subject
from pretrain.models import FamilyError, all_families
from pretrain.terminal.console import display, say
from pretrain.terminal.tables import JsonOption, Table, print_json

app = typer.Typer()


def complete_family(incomplete: str) -> list[str]:
    """Return the names of families that begin with a text."""
    return [name for name in all_families() if name.startswith(incomplete)]


@app.command("check-family")
def check_family(
    name: Annotated[
        str, typer.Argument(metavar="FAMILY", help="Name of the model family.", autocompletion=complete_family)
    ],
    law: Annotated[
        list[str] | None, typer.Option(help=f"Check only this law; repeat for more. {', '.join(map(str, LAWS))}.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check that a model family works with everything else.

    Engines, checkpoints and decoders rely on these laws of a family.
    Uses the family's small model on the CPU, and takes about two minutes.
    The exit code is 1 if a law is broken.
    """
    subject = Subject.of(name)
    laws = [known for known in LAWS if known.is_of(subject)]
    chosen = [known for known in laws if not law or known.name in law]
    if unknown := {*(law or ())} - {known.name for known in chosen}:
        raise FamilyError(f"{min(unknown)} is not a law of {name}; its laws are {', '.join(map(str, laws))}")
    results = list(check_laws(subject, chosen))
    if as_json:
        print_json(results)
    else:
        results_table(name, results).print()
    for result in results if not as_json else ():
        if result["fault"]:
            say(f"error: {result['law']}: {result['fault']}")
    if any(result["fault"] for result in results):
        raise typer.Exit(1)


def check_laws(subject: Subject, laws: list[Law]) -> Iterator[dict[str, Any]]:
    """Yield the result of each law: its name and statement, its seconds, and its fault or None."""
    for number, law in enumerate(laws, 1):
        started, fault = time.perf_counter(), None
        with tempfile.TemporaryDirectory() as folder, display.phase(f"law {number} of {len(laws)}: {law}"):
            try:
                law.check(subject, Path(folder))
            except BrokenLawError as error:
                fault = str(error)
        seconds = time.perf_counter() - started
        yield {"law": law.name, "statement": law.statement, "seconds": seconds, "fault": fault}


def results_table(name: str, results: list[dict[str, Any]]) -> Table:
    """Return the table of results, one row for each law."""
    table = Table(f"laws of {name}", ["law", "result", "seconds", "statement"], numbers=["seconds"])
    for result in results:
        outcome = "broken" if result["fault"] else "holds"
        table.add_row(result["law"], outcome, f"{result['seconds']:.1f}", result["statement"])
    return table
