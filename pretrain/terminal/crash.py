"""Crash files: the traceback of an error that nobody expected, kept for the people who mend it.

The file lies in the folder of the run that is trained, if there is one, because all nodes of a cluster see it and it
outlives the job. Else it lies in the working directory, or where that cannot be written, in the temporary directory.
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
"""EX_SOFTWARE of sysexits.h: a fault of the program, not of its input."""
SHOW = "BYTELOOM_TRACEBACK"
"""Environment variable; with the value 1 the terminal shows the traceback too."""
CRASH_PACKAGES = ("byteloom", "torch", "deepspeed", "mlflow")

_preferred: list[Path] = []


def keep_in(run_folder: Path) -> None:
    """Keep the crash files of this process in the folder of a run, once that is there."""
    _preferred[:] = [run_folder]


def report(error: BaseException) -> list[str]:
    """Write the crash file of an error; return the lines for the terminal, of which the last one says it all."""
    text = "".join(traceback.format_exception(error))
    path = _write(f"{_circumstances()}\n{text}")
    shown = text.splitlines() if path is None or os.environ.get(SHOW) == "1" else []
    where = f"; {path} has the traceback, please report it with that file" if path else ", whose traceback is above"
    return [*shown, f"error: unexpected {summary(error)}{where}"]


def summary(error: BaseException) -> str:
    """Return the kind of an error, and the first line of its text."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _write(text: str) -> Path | None:
    """Write the file to the first folder that takes it; None where no folder does."""
    name = f"byteloom-crash-{time.strftime('%Y%m%d-%H%M%S')}-{platform.node()}-{os.getpid()}.txt"
    for folder in (*_preferred, Path(), Path(tempfile.gettempdir())):
        path = folder / name
        try:
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink()  # what a full disk took of it
            continue
        return path
    return None


def _circumstances() -> str:
    """Return what a person needs to know besides the traceback, a line each."""
    facts = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": " ".join(sys.argv),
        "folder": os.environ.get("PWD", "unknown"),  # the working directory itself may be gone
        "rank": os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "none",
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: installed_version(package) or "not installed" for package in CRASH_PACKAGES},
    }
    return "".join(f"{name}: {value}\n" for name, value in facts.items())
