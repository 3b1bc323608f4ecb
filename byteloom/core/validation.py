"""Validation of config fields: shared types, and messages about wrong values, such as those that pydantic finds."""

import difflib
import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import Field
from pydantic_core import ErrorDetails

Seconds = Annotated[float, Field(gt=0, le=1e9)]
"""A time limit. Timers of the system take at most about 1e9 seconds, which is thirty years."""

SHOWN = 80
"""Largest number of characters of a wrong value that a message shows."""

BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
"""Faults of numbers out of their bounds: where pydantic keeps the bound, and its words."""


class Fault(NamedTuple):
    """Something that is wrong, or odd, in a recipe."""

    field: str
    """Dotted name; "" for the recipe as a whole."""
    text: str
    """A line for people."""


class Mismatch(NamedTuple):
    """Values of several fields that do not go together."""

    text: str
    fields: tuple[str, ...]
    """Their dotted names, first the one to change."""


class MismatchError(ValueError):
    """A config's fields do not go together; raised by its validator, with all that it found."""

    def __init__(self, found: Sequence[Mismatch]) -> None:
        super().__init__("; ".join(mismatch.text for mismatch in found))
        self.found = found


def describe_value(value: object) -> str:
    """Return a value as a recipe could have it, cut if it is long."""
    return shorten(json.dumps(value, ensure_ascii=False))


def shorten(text: str) -> str:
    """Return a text, cut with an ellipsis if it is too long to show."""
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def describe_expected(fault: ErrorDetails, *, section: str = "", examples: Sequence[Any] = ()) -> str:
    """Return what a field takes, for a value that it does not take: "it must be a whole number, such as 8".

    Args:
        fault: of pydantic.
        section: an example of the section that the field takes, or takes a list or a mapping of.
        examples: values that the field takes.
    """
    kind, given = fault["type"], fault["input"]
    context = fault.get("ctx", {})
    if kind in BOUNDS:
        name, words = BOUNDS[kind]
        return f"it must be {words} {_number(context[name])}"
    if kind in ("enum", "literal_error"):
        return f"it must be {one_of(context['expected'], given)}"
    if kind == "string_pattern_mismatch":
        return f"it must look like {' or '.join(map(str, examples)) or context['pattern']}"
    if kind == "string_too_short":
        return "it must not be empty"
    if kind == "string_type":
        return "it must be text" + (f": '{given}', in quotes" if _scalar(given) else "")
    expected = {
        "bool_type": "true or false",
        "dict_type": f"a mapping, such as {{name: {section or 'value'}}}",
        "float_type": "a number, such as 0.1",
        "int_type": f"a whole number{_whole_number(given)}",
        "model_type": f"a section, such as {section}",
        **dict.fromkeys(("list_type", "tuple_type"), f"a list, such as [{section or _scalar(given) or 'a, b'}]"),
        "too_long": f"a list of {context.get('max_length')}",
    }
    return f"it must be {expected[kind]}" if kind in expected else fault["msg"]


def one_of(expected: str, given: object) -> str:
    """Return pydantic's list of names, with a hint at the one that a wrong name is nearest to."""
    names = re.findall(r"'([^']*)'", expected)
    listed = ", ".join(f"'{name}'" for name in names[:-1])
    return (f"{listed} or '{names[-1]}'" if listed else f"'{names[0]}'") + nearest(given, names)


def nearest(given: object, known: Sequence[str]) -> str:
    """Return a hint at the known name that a wrong one is nearest to; "" where none is near."""
    near = difflib.get_close_matches(str(given), known, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def _number(bound: float) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)


def _scalar(given: object) -> str:
    """Return a scalar as text; "" for a list, a mapping and null."""
    return "" if given is None or isinstance(given, list | dict) else str(given)


def _whole_number(given: object) -> str:
    """Return the whole number that a value means, or an example."""
    if isinstance(given, str) and re.fullmatch(r"-?[0-9]+", given):
        return f": {given}, without quotes"
    if isinstance(given, float) and given.is_integer() and abs(given) < 1e15:
        return f": {int(given)}, without a point or an exponent"
    return ", such as 8"
