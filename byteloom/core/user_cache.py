"""The user's cache folder."""

import os
from pathlib import Path


def user_cache() -> Path:
    """Return Byteloom's folder in the user's cache ($XDG_CACHE_HOME, or ~/.cache); it need not exist."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "byteloom"
