"""Config field that turns registered entries on by name: `callbacks: {weight_norm: {every: 100}}`.

    Callbacks = Annotated[dict[str, BaseModel], RegisteredNodes(CALLBACKS)]

Each value is validated by the config node of its entry. A name that is not registered is refused.
"""

import json
from collections.abc import Mapping
from typing import Any, Protocol

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from byteloom.core.registries.registry import Registry, RegistryError

NOT_REGISTERED = "not_registered"
"""Type of the pydantic error of a name that cannot be used; its message says why."""


class Configurable(Protocol):
    """A registered entry that has a config node."""

    @property
    def config(self) -> type[BaseModel]:
        """Config node of the entry."""


class RegisteredNodes:
    """Annotation of a field that maps names of a registry to config nodes.

    Args:
        registry: entries with a config node each.
    """

    def __init__(self, registry: Registry[Any]) -> None:
        self._registry = registry

    def nodes(self) -> dict[str, type[BaseModel]]:
        """Return the config node of each usable entry, by name."""
        return {name: entry.config for name, entry in self._registry.entries().items()}

    def node(self, name: str) -> type[BaseModel] | None:
        """Return the config node of an entry; None for a name that cannot be used."""
        try:
            return self._entry(name).config
        except RegistryError:
            return None

    def _entry(self, name: str) -> Configurable:
        entry: Configurable = self._registry.get(name)
        return entry

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validate and serialize each value by its own node."""
        return core_schema.no_info_after_validator_function(
            self._validated,
            core_schema.dict_schema(core_schema.str_schema(), core_schema.any_schema()),
            serialization=core_schema.plain_serializer_function_ser_schema(_as_json, when_used="always"),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Describe a section whose fields are the registered names."""
        sections = {name: handler(node.__pydantic_core_schema__) for name, node in self.nodes().items()}
        return {"type": "object", "properties": sections, "additionalProperties": False}

    def _validated(self, values: Mapping[str, Any]) -> dict[str, BaseModel]:
        nodes, faults = dict[str, BaseModel](), list[InitErrorDetails]()
        for name, value in values.items():
            try:
                nodes[name] = _node_of(self._entry(name).config, value)
            except RegistryError as error:
                kind = PydanticCustomError(NOT_REGISTERED, "{reason}", {"reason": str(error)})
                faults.append(InitErrorDetails(type=kind, loc=(name,), input=value))
            except ValidationError as error:
                faults += [_moved(name, fault) for fault in error.errors(include_url=False)]
        if faults:
            raise ValidationError.from_exception_data("registered", faults)
        return nodes


def _node_of(config: type[BaseModel], value: Any) -> BaseModel:
    """Return a value as the node of its entry. Values of a recipe are validated strictly, as all of its fields are."""
    if isinstance(value, config):
        return value
    return config.model_validate_json(json.dumps(value), strict=True)


def _moved(name: str, fault: Any) -> InitErrorDetails:
    """Return a fault of a node as one of the field that holds the node."""
    kind, context = fault["type"], fault.get("ctx", {})
    if kind in ("value_error", "assertion_error"):
        kind = PydanticCustomError("value_error", "{error}", context)
    return InitErrorDetails(type=kind, loc=(name, *fault["loc"]), input=fault["input"], ctx=context)


def _as_json(nodes: Mapping[str, BaseModel]) -> dict[str, Any]:
    return {name: node.model_dump(mode="json") for name, node in nodes.items()}
