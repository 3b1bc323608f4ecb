"""What a run was made of, and what differs between two starts of it."""

import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from byteloom.core.packages import installed_version

PACKAGES = ("byteloom", "torch", "deepspeed", "numpy", "zstandard", "webdataset", "mlflow")


def environment() -> dict[str, str]:
    """Software and machine, as far as they can change a number."""
    return {
        **{f"version.{name}": installed_version(name) or "none" for name in PACKAGES},
        "version.python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def git_state(folder: Path) -> dict[str, str]:
    """Commit and cleanliness of the working tree that holds a folder; empty where there is none."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None  # no git, or no repository: then there is no state to tell
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    return {} if commit is None else {"git.commit": commit, "git.clean": str(git("status", "--porcelain") == "")}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of mappings as {dotted name: leaf}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two trees, a line each."""
    old, new = flatten(then), flatten(now)
    return [f"{name}: {old.get(name)} -> {new.get(name)}" for name in old | new if old.get(name) != new.get(name)]
