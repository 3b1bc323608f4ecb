"""Lineage of the catalogue: each model below the one that it extends first."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pretrain.catalogue.entries import Entry


@dataclass(frozen=True)
class Node:
    """An entry, and those that extend it first."""

    entry: Entry
    children: tuple["Node", ...]

    def walk(self) -> Iterator["Node"]:
        """Yield this node, and all below it."""
        yield self
        for child in self.children:
            yield from child.walk()


def lineage(entries: Mapping[str, Entry], root: str | None = None) -> list[Node]:
    """Return the trees of a catalogue; of one entry and its descendants if `root` names it.

    Raises:
        KeyError: no entry has the name.
    """
    children: dict[str | None, list[str]] = {}
    for entry in entries.values():
        children.setdefault(entry.extends[0] if entry.extends else None, []).append(entry.name)

    def node(name: str) -> Node:
        return Node(entries[name], tuple(node(child) for child in children.get(name, ())))

    return [node(name) for name in ([root] if root is not None else children[None])]


def tree_lines(nodes: Sequence[Node]) -> Iterator[str]:
    """Yield the lines of trees: a name, its year, its other parents, and a star if it has recipes."""
    for node in nodes:
        yield label(node.entry)
        yield from _below(node, "")


def _below(node: Node, indent: str) -> Iterator[str]:
    for number, child in enumerate(node.children, 1):
        is_last = number == len(node.children)
        yield f"{indent}{'└' if is_last else '├'} {label(child.entry)}"
        yield from _below(child, indent + ("  " if is_last else "│ "))


def label(entry: Entry) -> str:
    """Return the text of an entry in a tree."""
    others = f" + {', '.join(entry.extends[1:])}" if len(entry.extends) > 1 else ""
    return f"{entry.name} {entry.date[:4]}{others}{' *' if entry.recipes else ''}"
