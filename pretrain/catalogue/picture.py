"""Picture of the lineage, as SVG: time from left to right, one line a model.

python -m pretrain.catalogue.picture docs/assets/lineage.svg
"""

import math
import sys
from html import escape
from pathlib import Path

from pretrain.catalogue.entries import Entry, read_catalogue
from pretrain.catalogue.lineage import Node, lineage

LINE, YEAR, LEFT, TOP = 17, 86, 12, 38
"""Height of a line, width of a year, and margins, in pixels."""
LETTER = 7
"""Most width of a letter of a name, on average, in pixels."""
COLOURS = {"encoder": "#4477aa", "decoder": "#ee6677", "encoder-decoder": "#228833", "either": "#997700"}
"""Colour of each architecture (Paul Tol's bright scheme)."""


def picture(nodes: list[Node]) -> str:
    """Return the SVG of trees, each node below its parent and right of it."""
    order = [node for root in nodes for node in root.walk()]
    line_of = {node.entry.name: number for number, node in enumerate(order)}
    first = min(int(node.entry.date[:4]) for node in order)
    last = max(int(node.entry.date[:4]) for node in order) + 1
    height = TOP + len(order) * LINE + 12

    def place(entry: Entry) -> tuple[float, float]:
        years = int(entry.date[:4]) - first + (int(entry.date[5:]) - 1) / 12
        return LEFT + years * YEAR, TOP + line_of[entry.name] * LINE + LINE / 2

    names_end = max(place(node.entry)[0] + LETTER * (len(node.entry.name) + 2) for node in order)
    width = math.ceil(max(LEFT + (last - first) * YEAR + 40, names_end))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for year in range(first, last + 1):
        left = LEFT + (year - first) * YEAR
        parts.append(f'<line x1="{left}" y1="{TOP - 8}" x2="{left}" y2="{height - 8}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{left + 3}" y="{TOP - 12}" fill="#777777">{year}</text>')
    for node in order:
        x, y = place(node.entry)
        for child in node.children:
            to_x, to_y = place(child.entry)
            parts.append(f'<path d="M{x:.1f} {y:.1f}V{to_y:.1f}H{to_x:.1f}" fill="none" stroke="#bbbbbb"/>')
    for node in order:
        parts += _mark(node.entry, *place(node.entry))
    for number, (name, colour) in enumerate(COLOURS.items()):
        parts.append(f'<text x="{LEFT + 120 * number}" y="12" fill="{colour}">● {name}</text>')
    parts.append(
        f'<text x="{LEFT + 120 * len(COLOURS)}" y="12" fill="#222222" font-weight="bold">bold: has a recipe</text>'
    )
    return "\n".join([*parts, "</svg>\n"])


def _mark(entry: Entry, x: float, y: float) -> list[str]:
    weight = ' font-weight="bold"' if entry.recipes else ""
    text = f'<text x="{x + 7:.1f}" y="{y + 4:.1f}" fill="#222222"{weight}>{escape(entry.name)}</text>'
    return [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{COLOURS[entry.architecture]}"/>', text]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(picture(lineage(read_catalogue())), encoding="utf-8")
