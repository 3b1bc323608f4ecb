"""Text for people and for files."""

import io
import sys


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun in the singular or the plural: 1 step, 2 steps."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def printable(text: str) -> str:
    """Return a text in which the bytes of a file name that are not UTF-8 are shown as escapes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def clean(text: str) -> str:
    """Return text with escapes for characters that move the cursor or cannot be printed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in printable(text))


def escape_unknown_characters() -> None:
    """Let standard output and error print escapes for characters that their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
