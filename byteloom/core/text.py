"""Text for people and for files."""


def printable(text: str) -> str:
    """Return a text in which the bytes of a file name that are not UTF-8 are shown as escapes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
