"""Locks between processes. The kernel ends a lock with its process, however the process ends.

    lock_file       a file that exists only to be locked; it names its holder      filelock
    lock_folder     a folder that one process at a time may change                 flock
    lock_content    a file whose content the holder reads and writes               flock
    holder_of       the process that holds a lock file                             shared flock

filelock locks with flock too, so all of these exclude each other on one path. Plain flock remains where filelock
cannot do it: it opens no folders, its older versions truncate the file that they lock, and it has no shared flock.

Network file systems: NFS passes the locks of files to its server, so they hold between nodes; it refuses to lock
folders. Lustre needs the mount option flock; with localflock a lock holds within one node only. Where a file system
has no locks, OSError is raised; filelock's fallback to files that outlive a killed process is off.
"""

import errno
import fcntl
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)

SILENT_WAIT_SECONDS = 2.0
"""Waits that are longer than this are logged."""


class LockHolder(NamedTuple):
    """Process that holds a lock file."""

    host: str
    """Name of its machine; empty if the process is not known."""
    process: int

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}" if self.host else "another process"


class LockHeldError(Exception):
    """Another process holds the lock; the message names it where it is known."""

    def __init__(self, path: Path, holder: LockHolder) -> None:
        super().__init__(f"{holder} holds {path}")
        self.holder = holder


@contextmanager
def lock_file(path: Path, *, seconds: float | None = None) -> Iterator[None]:
    """Hold a lock file, which is created if it is absent, and write the name of this process into it.

    Args:
        path: the lock file.
        seconds: how long to wait for the lock; None waits without end, and logs a message.

    Raises:
        LockHeldError: another process still holds the lock after this time.
        OSError: the file cannot be opened, or the file system has no locks.
    """
    from filelock import FileLock, Timeout  # noqa: PLC0415 - it takes longer to import than most commands need

    if not path.parent.exists():  # filelock would make the folder, which its owner may just have removed
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=SILENT_WAIT_SECONDS if seconds is None else seconds)
    except Timeout as error:
        holder = holder_of(path) or LockHolder("", 0)
        if seconds is not None:
            raise LockHeldError(path, holder) from error
        log.info("waiting for %s, which %s holds", path, holder)
        lock.acquire()
    try:
        path.write_text(f"{os.uname().nodename} {os.getpid()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def holder_of(path: Path) -> LockHolder | None:
    """Return the process that holds a lock file; None if none does, as far as this machine can tell.

    A process that has just taken the lock and has not yet written its name does not count.
    """
    try:
        file = path.open(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    with file:
        try:
            # A shared lock: two processes that look at once do not take each other for the holder.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = file.read()
        else:
            return None
    if not text:
        return None
    named = re.fullmatch(r"(\S+) ([0-9]{1,9})\n", text)
    return LockHolder(named[1], int(named[2])) if named else LockHolder("", 0)


@contextmanager
def lock_folder(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder, without a lock file in it.

    Args:
        folder: an existing folder.
        wait: wait until no other process holds it, and log a message.

    Raises:
        LockHeldError: another process holds the folder, and `wait` is false.
        OSError: there is no such folder, or its file system has no locks of folders.
    """
    # filelock opens its file for writing, which a folder does not allow.
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if not wait:
                raise LockHeldError(folder, LockHolder("", 0)) from error
            log.info("waiting for %s, which another process holds", folder)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def lock_content(path: Path) -> Iterator[int]:
    """Hold a file whose content the holder reads and writes; yield its descriptor. Wait while another holds it.

    Raises:
        OSError: the file cannot be opened, or the file system has no locks.
    """
    # Older versions of filelock truncate the file that they lock.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)
