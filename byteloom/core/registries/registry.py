"""Registry of things that a recipe names and that one file can add.

    own package            its modules register when they are imported; names() and get() import all of them first
    entry point group      [project.entry-points."byteloom.callbacks"]  weight_norm = "their_package.weight_norm"

The name of an entry point is the name of its entry, and importing the module that it names registers the entry. A
package whose entry point cannot be used does not disturb runs that do not ask for it.
"""

import importlib
import logging
import pkgutil
import sys
from collections import defaultdict
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from byteloom.core.errors import CorrectableError
from byteloom.core.validation import nearest

log = logging.getLogger(__name__)

Entry = TypeVar("Entry")


class RegistryError(CorrectableError):
    """A name cannot be registered, or nothing usable is registered by it."""


class Registry(Generic[Entry]):
    """Entries by name: those that modules have registered, and those of an entry point group.

    Args:
        what: one entry in a word, for messages, such as "callback".
        group: entry point group in which other packages name theirs.
        package: package whose modules register Byteloom's own entries; None if something else imports them.
    """

    def __init__(self, what: str, group: str, package: str | None = None) -> None:
        self.what = what
        self.group = group
        self._package = package
        self._entries: dict[str, Entry] = {}
        self._is_imported = False
        self._loaded: set[str] = set()
        """Names whose entry points have been imported."""

    def register(self, name: str, entry: Entry) -> None:
        """Add an entry.

        Raises:
            RegistryError: the name is taken.
        """
        if name in self._entries:
            raise RegistryError(f"the {self.what} {name} is registered twice; rename or remove one")
        self._entries[name] = entry

    def remove(self, name: str) -> None:
        """Forget an entry that this process registered; tests use it."""
        del self._entries[name]

    def names(self) -> list[str]:
        """Return all names: registered ones in their order, then those of entry points, which it does not import."""
        self._import_package()
        return list(dict.fromkeys([*self._entries, *sorted(self._offered())]))

    def get(self, name: str) -> Entry:
        """Return the entry of a name; import the module of its entry point first, if there is one.

        Raises:
            RegistryError: there is none, or its entry point cannot be used.
        """
        self._import_package()
        offered = self._offered()
        if name in offered and name not in self._loaded:
            self._load(name, offered[name])
        if name not in self._entries:
            known = self.names()
            listed = f"; there is {', '.join(known)}" if known else "; none is registered"
            raise RegistryError(f"{name} is not the name of a {self.what}{nearest(name, known) or listed}")
        return self._entries[name]

    def entries(self) -> dict[str, Entry]:
        """Return all usable entries by name. Log a warning for each entry point that cannot be used."""
        usable, faults = self._loaded_entries()
        for fault in faults:
            log.warning("%s", fault)
        return usable

    def usable(self) -> dict[str, Entry]:
        """Return all usable entries by name."""
        return self._loaded_entries()[0]

    def _loaded_entries(self) -> tuple[dict[str, Entry], list[RegistryError]]:
        usable, faults = dict[str, Entry](), list[RegistryError]()
        for name in self.names():
            try:
                usable[name] = self.get(name)
            except RegistryError as error:
                faults.append(error)
        return usable, faults

    def _import_package(self) -> None:
        if self._package is not None and not self._is_imported:
            for module in own_modules(self._package):
                importlib.import_module(module)
            self._is_imported = True

    def _offered(self) -> dict[str, list[EntryPoint]]:
        return _entry_points_by_name(self.group, tuple(sys.path))

    def _load(self, name: str, offers: list[EntryPoint]) -> None:
        """Import the module that registers a name.

        Args:
            name: of the entry.
            offers: all entry points of this name.
        """
        if len(offers) > 1:
            packages = " and ".join(sorted(map(_package_of, offers)))
            raise RegistryError(f"{packages} both have a {self.what} named {name} (group {self.group}); remove one")
        (offer,) = offers
        where = f"the entry point {name} = {offer.value} of {_package_of(offer)} (group {self.group})"
        if name in self._entries and offer.module not in sys.modules:
            raise RegistryError(f"{where} has the name of another {self.what}; rename one")
        try:
            offer.load()
        except Exception as error:
            raise RegistryError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
        if name not in self._entries:
            raise RegistryError(f"{where} registers no {self.what} named {name}")
        self._loaded.add(name)


@cache
def own_modules(package: str) -> list[str]:
    """Return the names of a package's modules, in alphabetical order."""
    path = importlib.import_module(package).__path__
    return sorted(f"{package}.{module.name}" for module in pkgutil.iter_modules(path))


@cache
def _entry_points_by_name(group: str, _path: tuple[str, ...]) -> dict[str, list[EntryPoint]]:
    """Return the entry points of a group. They are searched again when the import path changes."""
    found: dict[str, list[EntryPoint]] = defaultdict(list)
    for entry in entry_points(group=group):
        found[entry.name].append(entry)
    return dict(found)


def _package_of(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "an unknown package"
