"""Numbers in words, for people."""


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun in the singular or the plural: 1 step, 2 steps."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
