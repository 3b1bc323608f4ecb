"""Explain fields and sections of the config by their types, defaults, bounds and docstrings."""

import json
import types
import typing
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from byteloom.core.registries.names import RegisteredName
from byteloom.core.validation import nearest
from pretrain.config.errors import ConfigError
from pretrain.config.fields import FieldPath, all_fields, entries_of, nodes_at, registered_in
from pretrain.config.schema import Config


def explain(name: str) -> str:
    """Return what a dotted field or section means, with its type, default and bounds.

    Raises:
        ConfigError: there is no such field.
    """
    path = tuple(name.split("."))
    parents = [node for node in nodes_at(path[:-1]) if path[-1] in node.model_fields]
    nodes = nodes_at(path)
    if not parents and not nodes:
        known = [".".join(field) for field, _ in all_fields(Config, ())]
        raise ConfigError(f"{name} is not a field{nearest(name, known)}")
    if not nodes:
        texts = [(node.__name__, _explain_value(path, node.model_fields[path[-1]])) for node in parents]
        return texts[0][1] if len(texts) == 1 else "\n".join(f"In {node}:\n{text}" for node, text in texts)
    sections = []
    for node in nodes:
        own = [_explain_field(".".join(p), field) for p, field in all_fields(node, path)]
        sections.append(f"{name}: {(node.__doc__ or '').strip()}\n\n" + "\n".join(own))
    return "\n\n".join(sections)


def _explain_value(path: FieldPath, field: FieldInfo) -> str:
    """Return the explanation of a field, and of the fields of its entries."""
    entries, registered = entries_of(field.annotation), registered_in(field)
    nodes = registered.nodes() if registered else {"EACH": entries} if entries else {}
    each = [found for name, node in nodes.items() for found in all_fields(node, (*path, name))]
    return "\n".join(_explain_field(".".join(p), f) for p, f in [(path, field), *each])


def _explain_field(name: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else f"default {json.dumps(to_jsonable_python(field.get_default()))}"
    bounds = [
        f"{word} {getattr(limit, attribute)}"
        for limit in field.metadata
        for attribute, word in (
            ("ge", "at least"),
            ("gt", "more than"),
            ("le", "at most"),
            ("lt", "less than"),
        )
        if hasattr(limit, attribute)
    ]
    meaning = " ".join((field.description or "").split())
    names = next((entry.names() for entry in field.metadata if isinstance(entry, RegisteredName)), None)
    kind = " | ".join(names) if names else _type_name(field.annotation)
    return f"{name}: {', '.join([kind, default, *bounds])}\n    {meaning}"


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) is typing.Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return " | ".join(map(_type_name, typing.get_args(annotation)))
    if entries := entries_of(annotation):
        return f"{'mapping' if typing.get_origin(annotation) is dict else 'list'} of {entries.__name__}"
    if typing.get_origin(annotation) is dict:
        return "mapping"
    return "null" if annotation is types.NoneType else str(getattr(annotation, "__name__", annotation))
