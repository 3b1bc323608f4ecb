"""The catalogue of Transformers: lists by family, date, task or architecture, the lineage, and one entry."""

import difflib
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer

from byteloom.core.text import count
from pretrain.catalogue import Entry, Grouping, grouped, lineage, read_catalogue
from pretrain.catalogue.lineage import tree_lines
from pretrain.terminal.tables import JsonOption, Table, print_json, print_lines

SOURCE = "Models of arXiv:2302.07730, and Transformers that Byteloom trains. `byteloom models about NAME` shows one."


def print_catalogue(by: Grouping, *, as_json: bool) -> None:
    """Print the entries of the catalogue in groups."""
    groups = grouped(list(read_catalogue().values()), by)
    if as_json:
        print_json({name: [entry_as_json(entry) for entry in entries] for name, entries in groups.items()})
        return
    catalogue_table(groups, by).print()
    with_recipes = sum(bool(entry.recipes) for entries in groups.values() for entry in entries)
    print_lines(
        ["", f"recipes: number of Byteloom's recipes; {count(with_recipes, 'model has', 'models have')} some.", SOURCE]
    )


def catalogue_table(groups: dict[str, list[Entry]], by: Grouping) -> Table:
    """Return a table with a row for each entry, under headings of its group."""
    table = Table(f"Transformers by {by}", ["model", "date", "lab", "parameters", "recipes"], ["parameters", "recipes"])
    for name, entries in groups.items():
        table.add_heading(name)
        for entry in entries:
            recipes = str(len(entry.recipes)) if entry.recipes else ""
            table.add_row("  " + entry.name, entry.date, entry.lab, entry.sizes, recipes)
    return table


def print_lineage(*, as_json: bool) -> None:
    """Print the lineage of the catalogue as a tree."""
    entries = read_catalogue()
    if as_json:
        print_json({name: list(entry.extends) for name, entry in entries.items()})
        return
    print_lines(
        [*tree_lines(lineage(entries)), "", "Each model is below the first one that it extends; + names others."]
    )
    print_lines(["*: Byteloom has recipes.", SOURCE])


def about(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a model, such as GPT-2.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Show what the catalogue knows of a model: paper, data, sizes, results and recipes."""
    entries = read_catalogue()
    by_lower = {known.lower(): entry for known, entry in entries.items()}
    entry = by_lower.get(name.lower())
    if entry is None:
        near = difflib.get_close_matches(name.lower(), by_lower, 2)
        hint = f"; did you mean {' or '.join(by_lower[match].name for match in near)}?" if near else ""
        raise typer.BadParameter(f"{name} is not in the catalogue{hint}", param_hint="NAME")
    if as_json:
        print_json(entry_as_json(entry))
    else:
        print_lines(list(entry_lines(entry, list(entries.values()))))


def entry_lines(entry: Entry, entries: Sequence[Entry]) -> Iterator[str]:
    """Yield the lines that describe an entry."""
    yield f"{entry.name}: {entry.title}"
    yield f"  {entry.source}"
    yield f"  {entry.date}, {entry.lab}"
    yield f"  family {entry.family}, architecture {entry.architecture}, task {entry.task}"
    if entry.extends:
        yield f"  extends {', '.join(entry.extends)}"
    yield f"  {entry.extension}"
    yield f"  application: {entry.application}"
    yield f"  corpus: {entry.corpus}"
    yield f"  parameters: {', '.join(entry.parameters) or 'not stated'}"
    for result in entry.results:
        split = "split not stated" if result.split == "not stated" else result.split
        yield f"  {result.data}: {result.value:g} {result.unit} ({result.mode}; {split})"
    if below := [other.name for other in entries if entry.name in other.extends]:
        yield f"  extended by {', '.join(below)}"
    yield f"  recipes: {', '.join(entry.recipes) or 'none'}"


def entry_as_json(entry: Entry) -> dict[str, Any]:
    """Return the fields of an entry, and its source."""
    return entry.model_dump(mode="json", exclude={"arxiv", "url"}) | {"source": entry.source}
