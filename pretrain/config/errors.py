"""Errors of recipes: the field, what it should be, and the place that its value came from."""

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from byteloom.core.errors import CorrectableError
from byteloom.core.registries.nodes import NOT_REGISTERED
from byteloom.core.validation import (
    Fault,
    Mismatch,
    MismatchError,
    describe_expected,
    describe_value,
    nearest,
    one_of,
)
from pretrain.config.fields import FieldPath, FieldWalk, entries_of, nodes_at
from pretrain.config.schema import Config


class ConfigError(CorrectableError):
    """A recipe or an override is wrong; the message has a line for each fault."""

    def __init__(self, message: str, faults: Sequence[Fault] = ()) -> None:
        super().__init__(message)
        self.faults = faults or [Fault("", message)]


class ValueOrigins:
    """The places that the values of a config came from: lines of a recipe, and overrides."""

    def __init__(self, source: str) -> None:
        """Start without values.

        Args:
            source: the file or the folder of the whole config, for values that are missing.
        """
        self.source = source
        self.lines: dict[FieldPath, str] = {}
        """Origin of each field by its path, such as "FILE:LINE"."""
        self._overrides: dict[FieldPath, str] = {}

    def override(self, path: FieldPath, origin: str) -> None:
        """Record an override of a field or a section, in place of what was known below it."""
        for places in (self.lines, self._overrides):
            for known in [known for known in places if known[: len(path)] == path]:
                del places[known]
        self._overrides[path] = origin

    def overriding(self, paths: Sequence[FieldPath]) -> str | None:
        """Return the last override of one of these values, of a section that holds it, or of a part of it."""
        found = [
            origin
            for at, origin in self._overrides.items()
            if any(at[: len(path)] == path[: len(at)] for path in paths)
        ]
        return found[-1] if found else None

    def of(self, paths: Sequence[FieldPath]) -> str:
        """Return the place that these values came from: an override, else a line of the recipe, else the source."""
        around = [path[:length] for path in paths for length in range(len(path) - 1, 0, -1)]
        line = next((self.lines[path] for path in [*paths, *around] if path in self.lines), None)
        return self.overriding(paths) or line or self.source


def describe_faults(
    error: ValidationError | None, unusable: Mapping[FieldPath, str], origins: ValueOrigins
) -> list[Fault]:
    """Return what is wrong with a config, in the order of its fields.

    Args:
        error: what pydantic found.
        unusable: values that no field takes, by their path: what is wrong with each.
        origins: the places that the values came from.
    """
    faults = [_fault(path, f"{'.'.join(path)} {text}", origins) for path, text in unusable.items()]
    for details in error.errors(include_url=False) if error else []:
        cause = details.get("ctx", {}).get("error")
        path, parent = _place(details["loc"])
        if isinstance(cause, MismatchError):
            faults += [_mismatch(mismatch, origins) for mismatch in cause.found]
        # A section whose value is unusable lacks that value now; one fault is enough.
        elif not any(at[: len(path)] == path for at in unusable):
            faults.append(_described(details, path, parent, origins))
    return faults


def _place(location: tuple[int | str, ...]) -> tuple[FieldPath, type[BaseModel]]:
    """Return the path of a fault without the families that pydantic adds, and the class that holds the value."""
    path: FieldPath = ()
    parents: list[type[BaseModel]] = []
    walk = FieldWalk()
    for part in map(str, location):
        if len(walk.nodes) > 1:
            walk.nodes = [node for node in walk.nodes if node.model_fields["family"].default == part]
        else:
            path, parents = (*path, part), walk.nodes
            walk.step(part)
    return path, (parents or [Config])[0]


def _fault(path: FieldPath, text: str, origins: ValueOrigins) -> Fault:
    return Fault(".".join(path), f"{origins.of([path])}: {text}")


def _mismatch(mismatch: Mismatch, origins: ValueOrigins) -> Fault:
    origin = origins.of([tuple(field.split(".")) for field in mismatch.fields])
    return Fault(mismatch.fields[0], f"{origin}: {mismatch.text}")


def _described(details: ErrorDetails, path: FieldPath, parent: type[BaseModel], origins: ValueOrigins) -> Fault:
    """Return a fault that pydantic found: what is wrong, the value, and what is expected.

    Args:
        details: the fault.
        path: the path of the value.
        parent: the config class that the value is a field of.
        origins: the places that the values came from.
    """
    kind, value = details["type"], details["input"]
    if kind == "union_tag_invalid":
        path, value = (*path, "family"), value["family"]
    name = ".".join(path)
    if kind == "extra_forbidden":
        hint = nearest(path[-1], list(parent.model_fields)) or f" (it has {', '.join(parent.model_fields)})"
        text = f"{name} is not a field of {parent.__name__}{hint}"
    elif kind == "missing":
        text = f"{name} is missing"
    elif kind == NOT_REGISTERED:
        text = f"{name}: {details['msg']}"
    elif kind == "value_error" and isinstance(value, dict):
        text = str(details["ctx"]["error"])
        text = text if text.startswith(f"{name}.") else f"{name}: {text}"
    elif kind == "value_error":
        text = f"{name} is {describe_value(value)}; {details['ctx']['error']}"
    else:
        text = f"{name} is {describe_value(value)}; {_expected(details, path, parent, origins)}"
    return _fault(path, text, origins)


def _expected(details: ErrorDetails, path: FieldPath, parent: type[BaseModel], origins: ValueOrigins) -> str:
    kind, value = details["type"], details["input"]
    if kind == "union_tag_invalid":
        return f"it must be {one_of(details['ctx']['expected_tags'], value['family'])}"
    if kind == "union_tag_not_found":
        return "it must be a section, such as {family: …}"
    if kind == "string_type" and origins.overriding([path]) and not isinstance(value, list | dict | None):
        # A shell removes quotes; quotes inside quotes reach the command.
        return f"""it must be text; in a shell: {".".join(path)}="'{value}'\""""
    field = parent.model_fields.get(path[-1])
    entries = entries_of(field.annotation) if field else None
    section = next((_example(node) for node in [*nodes_at(path), entries] if node), "")
    return describe_expected(details, section=section, examples=field.examples or () if field else ())


def _example(node: type[BaseModel]) -> str:
    """Return a section with its required fields, or with its first field."""
    names = [name for name, field in node.model_fields.items() if field.is_required()]
    return "{" + ", ".join(f"{name}: …" for name in names or list(node.model_fields)[:1]) + "}"
