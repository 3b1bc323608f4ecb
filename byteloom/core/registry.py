"""Registry of things that a recipe names and that one file can add.

    own modules            register when they are imported
    entry point group      [project.entry-points."byteloom.callbacks"]  weight_norm = "their_package.weight_norm"

The name of an entry point is the name of its entry, and importing the module that it names registers the entry. A
package whose entry point cannot be used does not disturb runs that do not ask for it.
"""

import logging
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from byteloom.core.validation import nearest

log = logging.getLogger(__name__)

Entry = TypeVar("Entry")


class RegistryError(Exception):
    """A name cannot be registered, or nothing usable is registered by it."""


class Registry(Generic[Entry]):
    """Entries by name: those that modules have registered, and those of an entry point group.

    Args:
        what: one entry in a word, for messages, such as "callback".
        group: entry point group in which other packages name theirs.
    """

    def __init__(self, what: str, group: str) -> None:
        self.what = what
        self.group = group
        self._entries: dict[str, Entry] = {}

    def register(self, name: str, entry: Entry) -> None:
        """Add an entry.

        Raises:
            RegistryError: the name is taken.
        """
        if name in self._entries:
            raise RegistryError(f"two {self.what}s are registered as {name}; rename or remove one")
        self._entries[name] = entry

    def remove(self, name: str) -> None:
        """Forget an entry that this process registered; tests use it."""
        del self._entries[name]

    def get(self, name: str) -> Entry:
        """Return the entry of a name; import the module of its entry point first, if that is needed.

        Raises:
            RegistryError: there is none, or its entry point cannot be used.
        """
        if name not in self._entries:
            offered = self._offered()
            if name not in offered:
                known = sorted({*self._entries, *offered})
                listed = f"; there is {', '.join(known)}" if known else "; none is registered"
                raise RegistryError(f"{name} is not the name of a {self.what}{nearest(name, known) or listed}")
            self._load(name, offered[name])
        return self._entries[name]

    def entries(self) -> dict[str, Entry]:
        """Return all usable entries by name. Log a warning for each entry point that cannot be used."""
        return dict(self._usable())

    def _usable(self) -> Iterator[tuple[str, Entry]]:
        for name in sorted({*self._entries, *self._offered()}):
            try:
                yield name, self.get(name)
            except RegistryError as error:
                log.warning("%s", error)

    def _offered(self) -> dict[str, EntryPoint]:
        return {entry.name: entry for entry in entry_points(group=self.group)}

    def _load(self, name: str, entry: EntryPoint) -> None:
        package = entry.dist.name if entry.dist else "an unknown package"
        where = f"the entry point {name} = {entry.value} of {package} (group {self.group})"
        try:
            entry.load()
        except Exception as error:
            raise RegistryError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
        if name not in self._entries:
            raise RegistryError(f"{where} registers no {self.what} of this name")
