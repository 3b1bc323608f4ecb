"""Text for people and for files."""


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun in the singular or the plural: 1 step, 2 steps."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def printable(text: str) -> str:
    """Return a text in which the bytes of a file name that are not UTF-8 are shown as escapes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
