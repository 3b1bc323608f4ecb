"""Warnings about files that are decoded nevertheless, logged with the name of the file.

Pillow uses Python's warnings. libtiff and mpg123 write to the standard error of the process. None of them knows the
name of the file.
"""

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePosixPath

MOST_FILES = 20
"""Number of files about which a process logs a warning; later warnings have the level DEBUG."""
STANDARD_ERROR = 2
ESCAPE = b"\x1b"

log = logging.getLogger(__name__)


class Remarks:
    """Warnings about one file. Not for threads that decode at the same time."""

    _files = 0
    """Number of files of this process that had a warning."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lines: dict[str, None] = {}

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Collect the warnings of libraries during the block."""
        try:
            with warnings.catch_warnings(record=True) as caught, _standard_error_in(self._lines):
                warnings.simplefilter("always")
                yield
        finally:
            self._lines |= dict.fromkeys(" ".join(str(each.message).split()) for each in caught)

    def add(self, remark: str) -> None:
        """Add a warning of our own."""
        self._lines[remark] = None

    def compare(self, formats: Mapping[str, str], found: str) -> None:
        """Add a warning if the suffix of the file stands for another format.

        Args:
            formats: format by suffix. Other suffixes stand for no format.
            found: format of the content.
        """
        suffix = PurePosixPath(self._name).suffix.lower()
        if formats.get(suffix, found) != found:
            self.add(f"its suffix is {suffix}, and its content is {found}")

    def log(self) -> None:
        """Log one line with the name of the file, if there was a warning."""
        if not self._lines:
            return
        Remarks._files += 1
        level = logging.WARNING if Remarks._files <= MOST_FILES else logging.DEBUG
        log.log(level, "%s was decoded with a warning: %s", self._name, self)
        if Remarks._files == MOST_FILES:
            log.warning("such warnings about further files are not shown")

    def __str__(self) -> str:
        first, *others = self._lines
        return f"{first} ({len(others)} more)" if others else first

    def __bool__(self) -> bool:
        return bool(self._lines)


@contextmanager
def _standard_error_in(lines: dict[str, None]) -> Iterator[None]:
    """Put the lines that libraries write to file descriptor 2 into a collection.

    Text with terminal escapes is a progress bar of this process; it is written to standard error afterwards.
    """
    sys.stderr.flush()
    try:
        own = os.dup(STANDARD_ERROR)
    except OSError:  # closed: nobody sees what is written
        yield
        return
    heard = _heard()
    try:
        os.dup2(heard, STANDARD_ERROR)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(own, STANDARD_ERROR)
        os.close(own)
        if size := os.lseek(heard, 0, os.SEEK_CUR):
            text = os.pread(heard, size, 0)
            os.ftruncate(heard, 0)
            os.lseek(heard, 0, os.SEEK_SET)
            if ESCAPE in text:
                os.write(STANDARD_ERROR, text)
            else:
                lines |= dict.fromkeys(" ".join(line.split()) for line in text.decode(errors="replace").splitlines())
                lines.pop("", None)


@cache
def _heard() -> int:
    """Return the descriptor of a deleted file that collects standard error."""
    descriptor, path = tempfile.mkstemp()
    Path(path).unlink()
    return descriptor
