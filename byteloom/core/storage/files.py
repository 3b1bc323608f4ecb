"""Files and folders that readers see whole or not at all.

Each is written next to its place as NAME.partial, flushed to the disk, and renamed.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from byteloom.core.storage.locks import LockHeldError, lock_folder


def replace_file(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a small text file; readers find the old text or the new one.

    Args:
        path: the file.
        text: its new content.
        durable: whether the text is on disk when this returns. Otherwise a loss of power may lose or damage it.

    Raises:
        OSError: it cannot be written. The error names `path`, and no partial file remains.
    """
    partial = partial_path(path)
    try:
        partial.write_text(text, encoding="utf-8")
        if durable:
            move_into_place(partial, path)
        else:
            partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def create_file(path: Path, text: str) -> None:
    """Write a small text file, which is on disk when this returns.

    Raises:
        FileExistsError: there is a file of that name.
    """
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
    sync(path)
    sync(path.parent)


def move_into_place(partial: Path, path: Path) -> None:
    """Put a written file on disk and give it its final name, which a file of that name loses."""
    sync(partial)
    partial.replace(path)
    sync(path.parent)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a folder to write into, which is renamed to `target` at the end of the block.

    If the block raises, the folder is removed. A folder that a killed writer left unfinished is removed first.

    Raises:
        FileExistsError: `target` exists already, or another process is writing it now.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists already")
    folder = partial_path(target)
    if folder.exists():
        with _writing(folder):
            shutil.rmtree(folder)
    folder.mkdir(parents=True)
    with _writing(folder):
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


def partial_path(target: Path) -> Path:
    """Return where a file or folder is written until it is whole."""
    return target.with_name(target.name + ".partial")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Mark a folder as one that a living process writes."""
    with ExitStack() as stack:
        try:
            stack.enter_context(lock_folder(folder))
        except LockHeldError as error:
            raise FileExistsError(f"another process is writing {folder}") from error
        yield


def sync(path: Path) -> None:
    """Put the content of a file or folder on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
