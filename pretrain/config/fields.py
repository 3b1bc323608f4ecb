"""Fields of the config, and the config classes that may stand at a path."""

import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from byteloom.core.registries.nodes import RegisteredNodes
from pretrain.config.schema import Config

FieldPath = tuple[str, ...]
"""Names of the sections and of the field, from the root."""


def entries_of(annotation: Any) -> type[BaseModel] | None:
    """Return the config class of the entries of a list or of a mapping by name; None for any other type."""
    kinds = [kind for kind in typing.get_args(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
    if BaseModel in kinds:  # entries of a registry, each with a class of its own
        return None
    return kinds[0] if typing.get_origin(annotation) in (dict, tuple) and kinds else None


def registered_in(field: FieldInfo) -> RegisteredNodes | None:
    """Return the nodes of a field that turns on entries of a registry by name; None for any other field."""
    return next((entry for entry in field.metadata if isinstance(entry, RegisteredNodes)), None)


def all_fields(node: type[BaseModel], path: FieldPath) -> Iterator[tuple[FieldPath, FieldInfo]]:
    """Yield each leaf field under a node with its path; for a model, the fields of every family."""
    for name, field in node.model_fields.items():
        nodes = node_classes(field.annotation)
        for inner in nodes:
            yield from all_fields(inner, (*path, name))
        if not nodes:
            yield (*path, name), field


def node_classes(annotation: Any) -> list[type[BaseModel]]:
    """Return the config classes that a field may hold: one, one for each family, or none for a plain value."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return node_classes(arguments[0])
    return [node for member in arguments for node in node_classes(member)] if origin is typing.Union else []


class FieldWalk:
    """A walk along a path from the root of the config, which knows the classes that may stand there."""

    def __init__(self) -> None:
        self.nodes: list[type[BaseModel]] = [Config]
        """Config classes that may stand here; none for a plain value, a collection of nodes, or nothing."""
        self._entries: list[type[BaseModel]] = []
        self._registered: list[RegisteredNodes] = []

    def step(self, name: str) -> None:
        """Enter a field, or an entry of a list or of a mapping by name."""
        fields = [node.model_fields[name] for node in self.nodes if name in node.model_fields]
        named = [node for registered in self._registered if (node := registered.node(name))]
        self.nodes = self._entries or named or [node for field in fields for node in node_classes(field.annotation)]
        self._entries = [entries for field in fields if (entries := entries_of(field.annotation))]
        self._registered = [registered for field in fields if (registered := registered_in(field))]


def nodes_at(path: FieldPath) -> list[type[BaseModel]]:
    """Return the config classes that may stand at a path; none for a plain value or an unknown path."""
    walk = FieldWalk()
    for name in path:
        walk.step(name)
    return walk.nodes
