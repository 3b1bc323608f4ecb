"""Rules by which patches start, in plain Python, that model.py uses."""

from typing import Any

from pretrain.models.references.layers import PADDING, SEPARATOR


def is_word(byte: int) -> bool:
    """Return whether a byte is a digit, a letter or a continuation of UTF-8."""
    return 0x80 <= byte <= 0xBF or (byte < 0x80 and chr(byte).isalnum())


def starts_of(patcher: dict[str, Any], capacity: int, read: list[int]) -> list[int]:
    """Return the positions at which patches start, given what each position of a row reads."""
    found = []
    for place, byte in enumerate(read):
        if patcher["name"] == "fixed":
            begins = place % patcher["size"] == 0
        else:
            begins = place > 0 and not is_word(byte) and is_word(read[place - 1])
        if (begins and byte != PADDING) or byte == SEPARATOR:
            found.append(place)
    return found[:capacity]
