"""Bits of the bytes of a text, as shades for a person to read.

bytes and their bits ─▶ characters_of ─▶ shades in a terminal, or surprise_page: one HTML page
"""

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import NamedTuple

SHADES = ("#fff7ec", "#fee8c8", "#fdd49e", "#fdbb84", "#fc8d59", "#ef6548", "#d7301f", "#990000")
"""Colors of 1 bit, 2 bits, … 8 bits and more (OrRd of ColorBrewer). Less than a bit has none."""
WHITE_FROM = 7
"""First shade that needs white letters."""


class Character(NamedTuple):
    """A character of a text, or a byte that belongs to none."""

    text: str
    """How it is shown."""
    bits: float
    """Mean bits of its bytes."""
    size: int
    """Number of its bytes."""

    @property
    def shade(self) -> int:
        """Number of its shade: whole bits, at most 8."""
        return min(len(SHADES), int(self.bits))


def characters_of(data: bytes, bits: Sequence[float]) -> Iterator[Character]:
    """Yield the UTF-8 characters of a text with their bits. Other bytes and control characters are shown as escapes.

    Args:
        data: the text.
        bits: bits of each byte.
    """
    begin = 0
    for character in data.decode("utf-8", "surrogateescape"):
        end = begin + len(character.encode("utf-8", "surrogateescape"))
        yield Character(visible(character), float(sum(bits[begin:end])) / (end - begin), end - begin)
        begin = end


def visible(character: str) -> str:
    """Return a character as a terminal can show it: nothing in it moves the cursor or changes a color."""
    if character == "\n":
        return "⏎\n"
    if character == "\t":
        return "→   "
    if character.isprintable():
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def surprise_page(title: str, summary: str, characters: Iterable[Character]) -> str:
    """Return an HTML page of shaded text, which needs no network. Each character names its bits under the pointer."""
    shades = "".join(
        f".s{number}{{background:{color};color:{'#fff' if number >= WHITE_FROM else '#000'}}}"
        for number, color in enumerate(SHADES, 1)
    )
    legend = "".join(f'<span class="s{number}"> {number} </span>' for number in range(len(SHADES) + 1))
    text = "".join(
        f'<span class="s{each.shade}" title="{each.bits:.2f} bits">{escape(each.text)}</span>' for each in characters
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ max-width: 80rem; margin: 0 auto; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; }}
span {{ print-color-adjust: exact; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }}
{shades}
</style>
</head>
<body><main>
<h1>{escape(title)}</h1>
<p>{escape(summary)}</p>
<p>Bits of a byte: {legend} and more. Point at a character to read its bits.</p>
<pre>{text}</pre>
</main></body>
</html>
"""
