"""Imports of other projects' packages: large ones, missing ones, and their versions.

Byteloom depends on packages that only some runs use. Such a package is imported within `needed_by`, when it is used.
"""

import gc
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

from byteloom.core.errors import CorrectableError


class MissingPackageError(CorrectableError):
    """A package that this run uses cannot be imported."""


@contextmanager
def long_lived_imports() -> Iterator[None]:
    """Disable the garbage collector during imports, and exclude what they made from later collections.

    This saves a quarter of the time that a command with torch takes to start and end.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def quiet_interrupts() -> Iterator[None]:
    """Let Ctrl-C kill the process by the signal, without the traceback of an import."""
    earlier = signal.getsignal(signal.SIGINT)
    if earlier is not signal.default_int_handler:  # for example ignored
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)


@contextmanager
def needed_by(user: str, package: str) -> Iterator[None]:
    """Name the package where an import within fails, with who needs it and the command that installs it.

    Args:
        user: the field, the command or the kind of file that needs the package.
        package: its name for pip.

    Raises:
        MissingPackageError: the package, or one that it needs, is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise missing(user, package, error) from error


def missing(user: str, package: str, error: ImportError) -> MissingPackageError:
    """Return the error that says who needs a package, how to install it, and what its import said."""
    reason = str(error).partition("\n")[0]
    return MissingPackageError(f"{user} needs {package}: pip install '{_requirement(package)}' ({reason})")


def installed_version(package: str) -> str | None:
    """Return the version of an installed package without importing it; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _requirement(package: str) -> str:
    """Return a package with the range of versions that Byteloom asks for, where it asks for one."""
    try:
        asked = metadata.requires("byteloom") or []
    except metadata.PackageNotFoundError:
        asked = []
    for requirement in asked:
        name = re.match(r"[\w.-]+", requirement)
        if name and name[0] == package:
            return requirement.partition(";")[0].strip()
    return package
