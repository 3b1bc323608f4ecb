"""Folders that are whole or not there: written beside their place, put on disk, then renamed into it."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when the block ends and vanishes when the block raises.

    What an earlier, killed writer left half-done is removed first.

    Raises:
        FileExistsError: `target` exists already, or another process is writing it now.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists already")
    folder = staging(target)
    if folder.exists():
        with _held(folder):
            shutil.rmtree(folder)
    folder.mkdir(parents=True)
    with _held(folder):
        try:
            yield folder
            for path in [*folder.rglob("*"), folder]:
                sync(path)
            folder.rename(target)
            sync(target.parent)
            sync(target.parent.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def staging(target: Path) -> Path:
    """Where a folder is written until it is whole."""
    return target.with_name(target.name + ".partial")


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Marks a folder as one that a living process writes; the mark ends with the process, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise FileExistsError(f"another process is writing {folder}") from error
    finally:
        os.close(descriptor)


def replace_file(path: Path, text: str) -> None:
    """Writes a small text file that readers see either as it was or as it is now."""
    staging = path.with_name(path.name + ".partial")
    staging.write_text(text, encoding="utf-8")
    sync(staging)
    staging.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Puts a file's or folder's content on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
