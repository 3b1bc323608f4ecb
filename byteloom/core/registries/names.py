"""Config fields that name an entry of a registry, and that entry's own options.

    name: Annotated[str, RegisteredName(OPTIMIZERS)] = "adamw"
    options: dict[str, Any] = {}        validated by the config node of the entry

A name that is not registered is refused with the nearest right one.
"""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from byteloom.core.registries.registry import Registry, RegistryError
from byteloom.core.validation import describe_expected, describe_value, nearest


class RegisteredName:
    """Annotation of a field that holds a name of a registry.

    Args:
        registry: of the names.
    """

    def __init__(self, registry: Registry[Any]) -> None:
        self._registry = registry

    def names(self) -> list[str]:
        """Return the names that the field takes."""
        return self._registry.names()

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Accept the names that are registered when a value is validated."""
        return core_schema.no_info_plain_validator_function(
            self._validated, serialization=core_schema.to_string_ser_schema()
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """List the names."""
        return {"type": "string", "enum": self.names()}

    def _validated(self, value: object) -> str:
        names = self.names()
        if not isinstance(value, str) or value not in names:
            quoted = [f"'{name}'" for name in names]
            expected = " or ".join([", ".join(quoted[:-1]), quoted[-1]]) if len(quoted) > 1 else quoted[0]
            raise PydanticKnownError("literal_error", {"expected": expected})
        try:
            self._registry.get(value)
        except RegistryError as error:
            raise ValueError(str(error)) from error
        return value


def validated_options(
    field: str, node: type[BaseModel] | None, values: Mapping[str, Any], *, owner: str
) -> dict[str, Any]:
    """Return the options of an entry as JSON values, with defaults filled in.

    Args:
        field: dotted name of the field that holds the options, for messages.
        node: config node of the entry; None if the entry has no options.
        values: the options that the recipe sets.
        owner: the entry in words, such as "optimizer.name lion".

    Raises:
        ValueError: an option is unknown, or has a wrong value.
    """
    if node is None:
        if values:
            raise ValueError(f"{field} has {next(iter(values))}, and {owner} has no options of its own")
        return {}
    try:
        return node.model_validate_json(json.dumps(dict(values)), strict=True).model_dump(mode="json")
    except ValidationError as error:
        faults = [_described(field, node, fault) for fault in error.errors(include_url=False)]
        raise ValueError("; ".join(faults)) from error


def _described(field: str, node: type[BaseModel], fault: Any) -> str:
    name = ".".join([field, *map(str, fault["loc"])])
    if fault["type"] == "extra_forbidden":
        known = list(node.model_fields)
        hint = nearest(fault["loc"][-1], known) or f" (it has {', '.join(known)})"
        return f"{name} is not a field of {node.__name__}{hint}"
    if fault["type"] == "missing":
        return f"{name} is missing"
    if fault["type"] == "value_error":
        return f"{name}: {fault['ctx']['error']}"
    return f"{name} is {describe_value(fault['input'])}; {describe_expected(fault)}"
