"""State of git repositories, asked for within a deadline.

git may hang on a network file system, scan a large repository for minutes, be absent, or refuse a repository of another
user. The caller waits for the deadline at most, and gets what is known by then.
"""

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

DEADLINE_SECONDS = 2.0
"""Limit of all questions together."""
OF_ANOTHER_REPOSITORY = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY")
"""Variables that git sets in hooks, and that would lead every question to that repository."""


@dataclass
class Repository:
    """Repository that holds a file."""

    file: Path
    tracked: bool = False
    """True: git must track the file. False: the file must only not be ignored."""
    commit: str | None = None
    """None where there is no such repository, or its answer is missing."""
    clean: bool | None = None
    """True if no file was changed or added since the commit. None if git did not answer."""

    def tags(self, prefix: str = "") -> dict[str, str]:
        """Return what is known, as PREFIXgit.commit and PREFIXgit.clean."""
        known = {"git.commit": self.commit, "git.clean": self.clean}
        return {prefix + name: str(value) for name, value in known.items() if value is not None}


def ask_git(repositories: Sequence[Repository], seconds: float = DEADLINE_SECONDS) -> None:
    """Fill in what git knows of repositories; raise nothing, and return when the time is over."""
    deadline = time.monotonic() + seconds
    # Threads, because starting a program can itself hang where its file system does.
    threads = [threading.Thread(target=_ask, args=(each, deadline), daemon=True) for each in repositories]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def _ask(repository: Repository, deadline: float) -> None:
    folder, name = repository.file.parent, repository.file.name
    untracked = [] if repository.tracked else ["--cached", "--others", "--exclude-standard"]
    if _git(folder, deadline, "ls-files", "--error-unmatch", *untracked, "--", name) is None:
        return
    commit = _git(folder, deadline, "rev-parse", "HEAD") or b""
    if re.fullmatch(rb"[0-9a-f]{40}|[0-9a-f]{64}", commit.strip()):
        repository.commit = commit.decode().strip()
        changes = _git(folder, deadline, "status", "--porcelain")
        repository.clean = None if changes is None else not changes


def _git(folder: Path, deadline: float, *arguments: str) -> bytes | None:
    """Return what git prints; None where it fails, is not there, or has not answered by the deadline."""
    command = ["git", "--no-optional-locks", "--literal-pathspecs", "-c", "core.fsmonitor=false", *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in OF_ANOTHER_REPOSITORY}
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError:
        return None
    with process:
        try:
            printed, _ = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            return None
    return printed if process.returncode == 0 else None
