"""What git leaves out: the rules of .gitignore files at every level of a source, and above it in its repository.

Rules are applied as git does (https://git-scm.com/docs/gitignore): folder by folder on the way down, so that what is in
a folder that is left out is never looked at.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path


@dataclass(frozen=True)
class Rule:
    """One line of a .gitignore file."""

    parts: tuple[str, ...]
    """Patterns of the names on the path from the file's folder; "**" stands for any number of names."""
    takes: bool
    """Whether what matches is taken after all: a line with an exclamation mark."""
    only_folders: bool

    def matches(self, path: Sequence[str], is_folder: bool) -> bool:
        return (is_folder or not self.only_folders) and _match(path, self.parts)


def parse_rules(content: bytes) -> tuple[Rule, ...]:
    """The lines of a .gitignore file that say something."""
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return tuple(rule for line in lines if (rule := _parse_line(os.fsdecode(line.removesuffix(b"\r")))))


@dataclass(frozen=True)
class RuleFile:
    """One .gitignore file, and how a path from the source becomes one from where the file lies."""

    rules: tuple[Rule, ...]
    below: tuple[str, ...] = ()
    """Names on the way from the source to the file's folder, for a file within the source."""
    above: tuple[str, ...] = ()
    """Names on the way from the file's folder to the source, for a file above the source."""

    def is_ignored(self, path: Sequence[str], is_folder: bool) -> bool | None:
        """Whether git ignores a path from the source, by the last rule that says so; None if no rule does."""
        path = (*self.above, *path[len(self.below) :])
        return next((not rule.takes for rule in reversed(self.rules) if rule.matches(path, is_folder)), None)


def is_ignored(path: Sequence[str], is_folder: bool, files: Sequence[RuleFile]) -> bool:
    """Whether git ignores what has a path, as names from the source, in a folder that it does not ignore.

    Args:
        files: of the folders above it, the highest first; the nearest that says something decides.
    """
    verdicts = (file.is_ignored(path, is_folder) for file in reversed(files))
    return path[-1] == ".git" or next((verdict for verdict in verdicts if verdict is not None), False)


def rules_above(folder: Path) -> tuple[RuleFile, ...]:
    """The .gitignore files between the top of the folder's repository and the folder, the top's first.

    A rule for the folder itself, and not for what is in it, has no say: its user has named it all the same.
    """
    repository = next((top for top in (folder, *folder.parents) if (top / ".git").exists()), folder)
    parents = [parent for parent in reversed(folder.parents) if parent.is_relative_to(repository)]
    return tuple(
        RuleFile(parse_rules((parent / ".gitignore").read_bytes()), above=folder.relative_to(parent).parts)
        for parent in parents
        if (parent / ".gitignore").is_file()
    )


def _parse_line(line: str) -> Rule | None:
    line = re.sub(r"(?<!\\) +$", "", line)
    takes = line.startswith("!")
    pattern = line.removeprefix("!") if takes else line
    path = pattern.rstrip("/")
    if not path or line.startswith("#"):
        return None
    # A name without a slash before it may be at any depth.
    parts = path.removeprefix("/").split("/") if "/" in path else ["**", path]
    return Rule(tuple(map(_as_fnmatch, parts)), takes, only_folders=pattern.endswith("/"))


def _as_fnmatch(part: str) -> str:
    """A pattern of one name as `fnmatch` writes it, which has no backslash and no [^…]."""
    unescaped = re.sub(r"\\(.)", lambda found: f"[{found[1]}]" if found[1] in "*?[" else found[1], part)
    return unescaped.replace("[^", "[!")


def _match(path: Sequence[str], parts: Sequence[str]) -> bool:
    if not parts:
        return not path
    if parts[0] != "**":
        return bool(path) and fnmatchcase(path[0], parts[0]) and _match(path[1:], parts[1:])
    if len(parts) == 1:
        return bool(path)  # a/** is what is in a, not a itself
    return any(_match(path[start:], parts[1:]) for start in range(len(path)))
