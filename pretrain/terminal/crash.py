"""Crash files: tracebacks of unexpected errors, for bug reports.

A crash file is written to the folder of the run that is trained, because all nodes see that folder and it outlives the
job. Without a run, it is written to the working directory, or else to the temporary directory.
"""

import contextlib
import os
import platform
import sys
import tempfile
import time
import traceback
from pathlib import Path

from byteloom.core.packages import installed_version

EXIT_CODE = 70
"""Exit code of a fault of the program, not of its input: EX_SOFTWARE of sysexits.h."""
SHOW = "BYTELOOM_TRACEBACK"
"""Environment variable; with the value 1, the terminal also shows the traceback."""
CRASH_PACKAGES = ("byteloom", "torch", "deepspeed", "mlflow")

_preferred: list[Path] = []


def keep_in(run_folder: Path) -> None:
    """Write the crash files of this process to the folder of a run once it exists."""
    _preferred[:] = [run_folder]


def report(error: BaseException) -> list[str]:
    """Write the crash file of an error; return the lines for the terminal. The last line is the summary."""
    text = "".join(traceback.format_exception(error))
    path = _write(f"{_circumstances()}\n{text}")
    shown = text.splitlines() if path is None or os.environ.get(SHOW) == "1" else []
    where = f"; {path} has the traceback, please report it with that file" if path else ", whose traceback is above"
    return [*shown, f"error: unexpected {summary(error)}{where}"]


def summary(error: BaseException) -> str:
    """Return the class of an error and the first line of its message."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _write(text: str) -> Path | None:
    """Write the file to the first folder that can be written; return its path, or None if none can."""
    name = f"byteloom-crash-{time.strftime('%Y%m%d-%H%M%S')}-{platform.node()}-{os.getpid()}.txt"
    for folder in (*_preferred, Path(), Path(tempfile.gettempdir())):
        path = folder / name
        try:
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink()  # a full disk leaves a part of the file
            continue
        return path
    return None


def _circumstances() -> str:
    """Return the facts that a bug report needs besides the traceback, one a line."""
    facts = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": " ".join(sys.argv),
        "folder": os.environ.get("PWD", "unknown"),  # the working directory may have been deleted
        "rank": os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "none",
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: installed_version(package) or "not installed" for package in CRASH_PACKAGES},
    }
    return "".join(f"{name}: {value}\n" for name, value in facts.items())
