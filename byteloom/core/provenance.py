"""Provenance of a run: its recipe, its code, and the differences between two starts.

A recipe is resolved by the command and trained in another process, or in a job much later. So each resolved recipe
NAME.yaml has a file NAME.source.json. It holds the original recipe, and the state of its repository and of Byteloom's.
"""

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from byteloom.core.configs import is_shipped, name_of
from byteloom.core.git import Repository, ask_git
from byteloom.core.packages import installed_version
from byteloom.core.text import printable

RECORDED_PACKAGES = ("byteloom", "torch", "deepspeed", "numpy", "zstandard", "webdataset", "mlflow")

DRIVER = Path("/proc/driver/nvidia/version")
"""File of Linux with the driver's version, such as `NVRM version: ... x86_64  580.65.06  Release Build`."""


def environment() -> dict[str, str]:
    """Software and machine, as far as they can change a number."""
    import torch  # noqa: PLC0415 takes seconds, and status needs none of it

    return {
        **{f"version.{name}": installed_version(name) or "none" for name in RECORDED_PACKAGES},
        "version.python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_threads": str(torch.get_num_threads()),
        "version.cuda": torch.version.cuda or "none",
        "version.nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none",
        "version.driver": driver_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def driver_version() -> str:
    """Return the version of the machine's NVIDIA driver, or none."""
    try:
        text = DRIVER.read_text(encoding="utf-8")
    except OSError:
        return "none"
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found[0] if found else "unknown"


def trace(recipe: Path) -> dict[str, str]:
    """Return the tags that say which recipe and which code a start is made of.

    recipe                              the name or the path that a person gave
    recipe.git.commit, recipe.git.clean the repository that holds the recipe
    git.commit, git.clean               Byteloom's source, where it is a checkout

    A tag is left out where there is no repository, or git does not answer in time.

    Args:
        recipe: a file. A resolved recipe keeps what was recorded of the recipe that it was made of.
    """
    own = Repository(Path(__file__).resolve(), tracked=True)
    earlier = read_source(recipe)
    if earlier or is_shipped(recipe):
        ask_git([own])
        of_recipe = {name: value for name, value in earlier.items() if name.startswith("recipe")} or {
            "recipe": name_of(recipe),
            **own.tags("recipe."),
        }
    else:
        repository = Repository(recipe.resolve())
        ask_git([own, repository])
        of_recipe = {"recipe": printable(name_of(recipe)), **repository.tags("recipe.")}
    return {**of_recipe, **own.tags()}


def save_resolved(path: Path, resolved: str, source: Mapping[str, str]) -> None:
    """Write a resolved recipe, given as YAML, and the file of its source."""
    path.write_text(resolved, encoding="utf-8")
    source_file(path).write_text(source_text(resolved, source), encoding="utf-8")


def source_file(recipe: Path) -> Path:
    """Return where the source of a resolved recipe is recorded."""
    return recipe.with_suffix(".source.json")


def source_text(resolved: str, source: Mapping[str, str]) -> str:
    """Return what `source_file` holds for a resolved recipe, given as YAML."""
    return json.dumps({**source, "sha256": _digest(resolved.encode())}, indent=1)


def read_source(recipe: Path) -> dict[str, str]:
    """Return the recorded source of a resolved recipe; empty where none is, or the recipe was changed since."""
    try:
        tags = json.loads(source_file(recipe).read_text(encoding="utf-8"))
        recorded = tags.pop("sha256") == _digest(recipe.read_bytes())
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}  # not there, damaged, or of somebody else
    return {name: str(value) for name, value in tags.items()} if recorded else {}


def _digest(recipe: bytes) -> str:
    return hashlib.sha256(recipe).hexdigest()


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a tree of mappings by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences between two trees, one line each."""
    old, new = flatten(then), flatten(now)
    return [f"{name}: {old.get(name)} -> {new.get(name)}" for name in old | new if old.get(name) != new.get(name)]
