"""Places of files: paths and URLs as people type them, and the user's cache folder."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from byteloom.core.storage.urls import join_url, split_query


class Url:
    """A URL of a file or folder. It has a name, a parent and children, as a Path has; a query stays at its end."""

    def __init__(self, text: str) -> None:
        path, query = split_query(text)
        self._text = path.rstrip("/") + query

    @property
    def name(self) -> str:
        """The part after the last slash."""
        return split_query(self._text)[0].rpartition("/")[2]

    @property
    def parent(self) -> "Url":
        """The URL without its name."""
        path, query = split_query(self._text)
        return Url(path.rpartition("/")[0] + query)

    def __truediv__(self, name: str) -> "Url":
        return Url(join_url(self._text, name))

    def __str__(self) -> str:
        return self._text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Url) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


Location = Path | Url


def locate(text: str | Location) -> Location:
    """Return the place that a text names: a URL, or a path of this machine."""
    if isinstance(text, str):
        return Url(text) if "://" in text else Path(text)
    return text


def expand_home(text: str) -> str:
    """Return a path with its leading `~` or `~user` replaced by that home folder; return a URL as it is.

    A shell expands `~` only at the beginning of a word, so `run.root=~/runs` and `--out=~/x` arrive as they were typed.
    A file that is called `~` is `./~`.

    Raises:
        ValueError: the user is not known, and there is no file of that name either.
    """
    if not text.startswith("~") or "://" in text:
        return text
    expanded = os.path.expanduser(text)  # noqa: PTH111 - pathlib raises RuntimeError, and drops a trailing slash
    if expanded == text and not os.path.lexists(text):
        user = text.partition("/")[0]
        raise ValueError(f"no home folder is known for {user}; a file of that name is ./{text}")
    return expanded


LocationText = Annotated[str, Field(min_length=1), AfterValidator(expand_home)]
"""Type of a config field that holds a path or a URL. A leading `~` is expanded when the recipe is read."""


def user_cache() -> Path:
    """Return Byteloom's folder in the user's cache ($XDG_CACHE_HOME, or ~/.cache); it need not exist."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "byteloom"
