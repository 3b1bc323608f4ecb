"""Processes that behave as if some packages were not installed."""

import os
from collections.abc import Mapping
from pathlib import Path

HOOK = """
import importlib.metadata
import sys

HIDDEN = {hidden!r}


class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


def from_name(name):
    if name in HIDDEN:
        raise importlib.metadata.PackageNotFoundError(name)
    return find(name)


sys.meta_path.insert(0, Hide())
find = importlib.metadata.Distribution.from_name
importlib.metadata.Distribution.from_name = from_name
"""


def without(folder: Path, *packages: str) -> Mapping[str, str]:
    """Return variables of the environment that hide packages from a process and from those that it starts.

    Args:
        folder: folder for a new sitecustomize.py, which Python runs first.
        packages: names of modules and distributions.
    """
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(HOOK.format(hidden=set(packages)), encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path}
