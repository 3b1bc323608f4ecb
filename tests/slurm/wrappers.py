"""Commands of Slurm that fail a number of times, then do what the real command does."""

import shutil
from pathlib import Path

SCRIPT = """#!/bin/bash
# Fails as often as the file says, for arguments that match.
if [[ "$*" == {only} ]]; then
    exec 9>>{left}.lock
    flock 9
    left=$(cat {left})
    if [ "$left" -gt 0 ]; then
        echo $((left - 1)) > {left}
        {before}
        echo {says!r} >&2
        exit 1
    fi
    exec 9>&-
fi
exec {real} "$@"
"""


def fail_at_first(
    folder: Path,
    command: str,
    times: int,
    says: str,
    only: str = "*",
    real: Path | str | None = None,
    *,
    does_it: bool = False,
) -> Path:
    """Write a command that fails a number of times; return the file with the number of failures to come.

    Args:
        folder: folder that is to be first in PATH.
        command: name of the command.
        times: number of calls that fail.
        says: what they print on standard error.
        only: pattern of bash for the arguments of the calls that fail.
        real: path of the command that is called afterwards; by default the one in PATH.
        does_it: whether a call that fails does its work first, so that only the answer is lost.
    """
    folder.mkdir(exist_ok=True)
    left = folder / f"{command}.left"
    left.write_text(f"{times}\n")
    script = folder / command
    real = real or shutil.which(command)
    before = f'{real} "$@" > /dev/null' if does_it else ""
    script.write_text(SCRIPT.format(only=only, left=left, says=says, real=real, before=before))
    script.chmod(0o755)
    return left
