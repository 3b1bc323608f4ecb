"""Shaded text in a terminal."""

from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from pretrain.evaluation.surprise import SHADES, WHITE_FROM, Character


def print_shaded(characters: Iterable[Character], end: str = "\n") -> None:
    """Print characters on standard output, each in the shade of its bits."""
    Console().print(_shaded(characters), end=end, soft_wrap=True)


def print_legend() -> None:
    """Print the shades with their bits on standard output."""
    legend = [Character(f" {bits} ", bits, 1) for bits in range(len(SHADES) + 1)]
    Console().print(Text("bits of a byte:").append_text(_shaded(legend)).append("and more"), soft_wrap=True)


def _shaded(characters: Iterable[Character]) -> Text:
    text = Text()
    for each in characters:
        text.append(each.text, _style(each.shade))
    return text


def _style(shade: int) -> str:
    return f"{'white' if shade >= WHITE_FROM else 'black'} on {SHADES[shade - 1]}" if shade else ""
