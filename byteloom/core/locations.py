"""Places of files: paths and URLs as people type them, and the user's cache folder."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field


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
