"""Pages of the documentation and their shell blocks."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[2]
TOP_LEVEL = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES = [*TOP_LEVEL, *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = {"sh", "console", "bash", "shell"}

FENCE = re.compile(r"(?ms)^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^ *```$")
MARKER = re.compile(r"<!-- not run: (?P<reason>[^>]+) -->\s*$")


@dataclass(frozen=True)
class Block:
    """Fenced block of shell commands."""

    page: Path
    line: int
    text: str
    reason: str | None
    """Reason why no test runs the block, or None if a test runs it."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> Iterator[str]:
        """Yield the commands, with continued lines joined."""
        for line in self.text.replace("\\\n", " ").splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                yield line.strip()


def blocks(page: Path) -> list[Block]:
    """Return the shell blocks of a page, in order."""
    content = page.read_text(encoding="utf-8")
    found = []
    for fence in FENCE.finditer(content):
        if fence["language"] in SHELL:
            marker = MARKER.search(content[: fence.start()])
            line = content.count("\n", 0, fence.start()) + 1
            found.append(Block(page, line, dedent(fence["text"]), marker and marker["reason"]))
    return found


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page: of its headings, and of the names whose docstrings it shows."""
    content = prose(page)
    titles = re.findall(r"(?m)^#+ (.*)$", content)
    words = (re.sub(r"[^\w\s-]", "", title.replace("`", "")).strip().lower() for title in titles)
    return {re.sub(r"[\s-]+", "-", word) for word in words} | set(re.findall(r"(?m)^::: ([\w.]+)$", content))
