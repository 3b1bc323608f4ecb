"""Tables that never truncate a value, at any width of the terminal.

    fits as it is?  ──▶ one table
            │ no
    fits with one space between columns, and text folded to 16 characters?  ──▶ one table
            │ no
    parts, one below the other: the first column again, and the other columns that fit

A file or a pipe has no width, so a table is as wide as it needs.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.cells import cell_len
from rich.console import Console

from byteloom.core.text import clean

GAP, NARROW_GAP = 2, 1
"""Spaces between columns if the table fits as it is, and otherwise."""
FOLDED_WIDTH = 16
"""Width to which a text column is folded before the table is split into parts."""
BREAK_AFTER = " -_/,.;:"
"""Characters after which text is folded, if one is in the second half of a line."""


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
"""Option of every command that prints a table."""


@dataclass(frozen=True)
class Column:
    """Name and kind of a column."""

    name: str
    is_number: bool = False
    """Numbers are aligned to the right and never folded."""


@dataclass(frozen=True)
class _Heading:
    """A line of text between rows, or a horizontal rule if the text is empty."""

    text: str


class Table:
    """Rows under columns.

    Args:
        title: printed above the table, folded to its width; empty for none.
        columns: names of the columns. Each part of a split table repeats the first column.
        numbers: names of the columns that hold numbers.
    """

    def __init__(self, title: str, columns: Sequence[str], numbers: Sequence[str] = ()) -> None:
        self._title = clean(title)
        self._columns = [Column(name, name in numbers) for name in columns]
        self._rows: list[Sequence[str] | _Heading] = []

    def add_row(self, *cells: str) -> None:
        """Add a row; missing cells at its end are empty."""
        missing = len(self._columns) - len(cells)
        self._rows.append([*map(clean, cells), *[""] * missing])

    def add_heading(self, text: str) -> None:
        """Add a line of text above the rows that follow."""
        self._rows.append(_Heading(clean(text)))

    def add_rule(self) -> None:
        """Add a horizontal rule above the rows that follow."""
        self._rows.append(_Heading(""))

    def print(self, out: Console | None = None) -> None:
        """Print the table, as wide as the terminal allows. Standard output is the default."""
        out = out or Console()
        for style, line in self._styled(terminal_width(out)):
            out.print(line, style=style, markup=False, highlight=False, soft_wrap=True)

    def lines(self, width: int | None) -> list[str]:
        """Return the lines of the table.

        Args:
            width: width of the terminal in columns; None for a file or a pipe.
        """
        return [line for _, line in self._styled(width)]

    def _styled(self, width: int | None) -> Iterator[tuple[str, str]]:
        """Yield the style and the text of each line."""
        if self._title:
            yield from (("italic", line) for line in fold(self._title, width))
        natural = self._natural_widths()
        gap = GAP if width is None or _total(natural, GAP) <= width else NARROW_GAP
        for number, part in enumerate(self._parts(natural, gap, width)):
            if number:
                yield "", ""
            yield from self._part(part, self._fitted({index: natural[index] for index in part}, gap, width), gap, width)

    def _natural_widths(self) -> list[int]:
        """Return the width of the longest cell of each column, including its name."""
        rows = [row for row in self._rows if not isinstance(row, _Heading)]
        return [
            max(map(cell_len, (column.name, *(row[index] for row in rows))))
            for index, column in enumerate(self._columns)
        ]

    def _parts(self, natural: Sequence[int], gap: int, width: int | None) -> list[list[int]]:
        """Return the indices of the columns of each part."""
        smallest = [
            size if column.is_number else min(size, FOLDED_WIDTH)
            for size, column in zip(natural, self._columns, strict=True)
        ]
        parts = [[0]]
        for index in range(1, len(self._columns)):
            taken = [smallest[other] for other in (*parts[-1], index)]
            if width is not None and _total(taken, gap) > width and len(parts[-1]) > 1:
                parts.append([0])
            parts[-1].append(index)
        return parts

    def _fitted(self, widths: dict[int, int], gap: int, width: int | None) -> dict[int, int]:
        """Return the column widths of a part, after narrowing the widest text columns until it fits."""
        texts = [index for index in widths if not self._columns[index].is_number]
        while texts and width is not None and _total(widths.values(), gap) > width:
            widest = max(texts, key=widths.__getitem__)
            if widths[widest] == 1:
                break
            widths[widest] -= 1
        return widths

    def _part(
        self, part: Sequence[int], widths: Mapping[int, int], gap: int, width: int | None
    ) -> Iterator[tuple[str, str]]:
        rule = "-" * _total(widths.values(), gap)
        if any(self._columns[index].name for index in part):
            names = [column.name for column in self._columns]
            yield from (("bold", line) for line in self._row(names, part, widths, gap))
            yield "", rule
        for row in self._rows:
            if not isinstance(row, _Heading):
                yield from (("", line) for line in self._row(row, part, widths, gap))
            elif row.text:
                yield from (("italic", line) for line in fold(row.text, width))
            else:
                yield "", rule

    def _row(self, cells: Sequence[str], part: Sequence[int], widths: Mapping[int, int], gap: int) -> Iterator[str]:
        """Yield the lines of a row, as many as its tallest cell has."""
        folded = {index: fold(cells[index], widths[index]) for index in part}
        for number in range(max(map(len, folded.values()))):
            texts = []
            for index in part:
                text = folded[index][number] if number < len(folded[index]) else ""
                padding = " " * (widths[index] - cell_len(text))
                texts.append(padding + text if self._columns[index].is_number else text + padding)
            yield (" " * gap).join(texts).rstrip()


def _total(widths: Collection[int], gap: int) -> int:
    """Return the width of columns side by side."""
    return sum(widths) + gap * (len(widths) - 1)


def facts(title: str, values: Mapping[str, str]) -> Table:
    """Return a table of names and their values, without a header."""
    table = Table(title, ("", ""))
    for name, value in values.items():
        table.add_row(name, value)
    return table


def print_lines(lines: Sequence[str]) -> None:
    """Print lines to standard output, each folded to the terminal's width."""
    out = Console()
    for line in lines:
        for folded in fold(clean(line), terminal_width(out)):
            out.print(folded, markup=False, highlight=False, soft_wrap=True)


def terminal_width(out: Console) -> int | None:
    """Return the width of a terminal in columns; None for a file or a pipe."""
    return out.width if out.file.isatty() else None


def fold(text: str, width: int | None) -> list[str]:
    """Return text in lines of a width, broken after a mark if possible.

    Spaces at a break are dropped; all other characters are kept. Spaces at the start indent every line.
    """
    if width is None or cell_len(text) <= width:
        return [text]
    rest = text.lstrip(" ")
    indent = " " * (len(text) - len(rest))
    if width <= 2 * len(indent):
        indent = ""
    lines, rest = [], rest.rstrip(" ")
    while cell_len(indent + rest) > width:
        end = _break(rest, width - len(indent))
        lines.append(indent + rest[:end].rstrip(" "))
        rest = rest[end:].lstrip(" ")
    return [*lines, indent + rest]


def _break(text: str, width: int) -> int:
    """Return the number of characters of a text that go into a line, at least one."""
    most = 1
    while cell_len(text[: most + 1]) <= width:
        most += 1
    for end in range(most, 0, -1):
        if cell_len(text[:end]) <= width // 2:
            break
        last, following = text[end - 1], text[end]
        is_within_number = last in ",." and following.isdigit()
        begins_path = last == "/" and text[end - 2 : end - 1] in ("", " ")
        if following == " " or (last in BREAK_AFTER and not is_within_number and not begins_path):
            return end
    return most


def figure(number: float) -> str:
    """Return a number with at least three digits in at most nine characters: 0.123, 12.3, 1,234, 1.23e+07."""
    if number == 0 or not math.isfinite(number):
        return f"{number:.0f}"
    if not 0.001 <= abs(number) < 999_999.5:
        return f"{number:.2e}"
    return f"{number:,.0f}" if abs(number) >= 99.95 else f"{number:#.3g}"


def print_json(tree: Any) -> None:
    """Print JSON to standard output; NaN and infinity are null."""
    print(json.dumps(_finite(tree), indent=1, allow_nan=False))


def _finite(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
