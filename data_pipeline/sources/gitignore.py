"""Rules of .gitignore files, applied as git applies them (https://git-scm.com/docs/gitignore).

    .gitignore ─▶ RuleFile, one for each folder on the way down ─▶ is_ignored(path)

pathspec compiles the rules. Its own matching answers a simpler question: does a rule match a path, or a folder above
it? git looks at each folder on the way down, and the nearest .gitignore file with a matching rule decides. Here a rule
must therefore match the path itself. The listing never enters an ignored folder.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pathspec import GitIgnoreSpec
from pathspec.pattern import RegexPattern

BRACKETS = re.compile(r"\[[!^]?\]?(?:\[:\w+:\]|[^\]])*\]")
"""A set of characters in a rule."""
CLASSES = {
    **{"alnum": "a-zA-Z0-9", "alpha": "a-zA-Z", "digit": "0-9", "lower": "a-z", "upper": "A-Z", "xdigit": "0-9a-fA-F"},
    **{"blank": " \t", "space": " \t\n\r\f\v", "cntrl": "\x00-\x1f\x7f", "graph": "!-.0-~", "print": " -.0-~"},
    **{"punct": "!-.:-@[-`{-~"},
}
"""Characters of each POSIX class, without `/`. pathspec does not know these classes."""


class Rule(NamedTuple):
    """One line of a .gitignore file."""

    pattern: re.Pattern[str]
    """Pattern of paths from the file's folder."""
    ignores: bool
    """True if the rule ignores the paths that match it; false for a line that begins with !."""

    def matches(self, path: str, is_folder: bool) -> bool:
        """Return whether the rule matches a path itself, not only a folder above it."""
        mark = next(iter(self.pattern.groupindex), None)  # pathspec names the slash after a name that matches
        if mark is None:
            return self.pattern.search(path) is not None
        found = self.pattern.finditer(f"{path}/" if is_folder else path)
        return any(each.end(mark) in (-1, len(path) + 1) for each in found)


@dataclass(frozen=True)
class RuleFile:
    """Rules of one .gitignore file."""

    rules: tuple[Rule, ...]
    """The rules, in the order of the file."""
    below: tuple[str, ...] = ()
    """Names on the way from the source to the file's folder, for a file within the source."""
    above: tuple[str, ...] = ()
    """Names on the way from the file's folder to the source, for a file above the source."""

    def is_ignored(self, path: Sequence[str], is_folder: bool) -> bool | None:
        """Return whether the last rule that matches a path ignores it; None if no rule matches.

        Args:
            path: names on the way from the source.
            is_folder: whether the path is a folder.
        """
        own = "/".join((*self.above, *path[len(self.below) :]))
        return next((rule.ignores for rule in reversed(self.rules) if rule.matches(own, is_folder)), None)


def parse_rules(content: bytes) -> tuple[Rule, ...]:
    """Return the rules of a .gitignore file. Lines that git skips, as empty or as invalid, are skipped."""
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return tuple(rule for line in lines for rule in _compiled(os.fsdecode(line.removesuffix(b"\r"))))


def is_ignored(path: Sequence[str], is_folder: bool, files: Sequence[RuleFile]) -> bool:
    """Return whether git ignores a path whose folder it does not ignore.

    Args:
        path: names on the way from the source.
        is_folder: whether the path is a folder.
        files: rule files of the folders above it, the highest first.
    """
    verdicts = (file.is_ignored(path, is_folder) for file in reversed(files))
    return path[-1] == ".git" or next((verdict for verdict in verdicts if verdict is not None), False)


def rules_above(folder: Path) -> tuple[RuleFile, ...]:
    """Return the rule files above a folder, up to the top of its repository, the highest first.

    A rule that ignores the folder itself has no effect, because the user has named the folder.
    """
    repository = next((top for top in (folder, *folder.parents) if (top / ".git").exists()), folder)
    parents = [parent for parent in reversed(folder.parents) if parent.is_relative_to(repository)]
    return tuple(
        RuleFile(parse_rules((parent / ".gitignore").read_bytes()), above=folder.relative_to(parent).parts)
        for parent in parents
        if (parent / ".gitignore").is_file()
    )


def _compiled(line: str) -> list[Rule]:
    """Return the rule of a line; none if the line has no rule."""
    line = BRACKETS.sub(lambda found: re.sub(r"\[:(\w+):\]", lambda name: CLASSES.get(name[1], ""), found[0]), line)
    line = re.sub(r"(?<!\\) +$", "", line)
    line = re.sub(r"\s$", lambda space: f"[{space[0]}]" if space[0] != " " else " ", line)  # git strips only spaces
    try:
        patterns = GitIgnoreSpec.from_lines([line]).patterns
    except ValueError:  # git takes such a line for a rule that matches nothing
        return []
    return [
        Rule(pattern.regex, pattern.include)
        for pattern in patterns
        if isinstance(pattern, RegexPattern) and pattern.regex is not None and pattern.include is not None
    ]
