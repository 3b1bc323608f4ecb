"""The config: one typed tree, assembled from the nodes that the rooms declare beside their code.

    recipe.yaml + dotted overrides ─▶ load ─▶ Config, immutable and checked

What is wrong is told in a line: the field, what it should be, and the file and line or the override it came from.
"""

import copy
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from byteloom.core.configs import UnknownNameError, find_recipe
from byteloom.core.validation import (
    Fault,
    Mismatch,
    MismatchError,
    describe_expected,
    describe_value,
    nearest,
    one_of,
    shorten,
)
from data_pipeline.stream.config import DataConfig
from data_pipeline.stream.loader import LoaderConfig
from data_pipeline.stream.mixture import MOST_SEQUENCES
from launchers.local import LaunchConfig
from launchers.supervision.supervisor import SuperviseConfig
from pretrain.checkpoint import CheckpointConfig
from pretrain.engines import EngineConfig
from pretrain.evaluation.evaluate import ValidationConfig
from pretrain.models import ModelConfig, carries_memory, default_family, families
from pretrain.optim.optimizers import OptimizerConfig, optimizer_warnings, schedule_mismatch
from pretrain.tracking import TrackingConfig
from pretrain.training.loop import TrainConfig
from pretrain.training.profiling import ProfileConfig
from pretrain.training.run_folder import RunConfig
from pretrain.training.weights import InitializeConfig


class Config(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """A Byteloom run."""

    run: RunConfig
    data: DataConfig
    loader: LoaderConfig = LoaderConfig()
    model: ModelConfig
    initialize: InitializeConfig = InitializeConfig()
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    launch: LaunchConfig = LaunchConfig()
    supervise: SuperviseConfig = SuperviseConfig()
    profile: ProfileConfig = ProfileConfig()

    @model_validator(mode="after")
    def _fields_go_together(self) -> Self:
        checked = (
            self._memory_without_rows(),
            self._muon_without_matrices(),
            schedule_mismatch(self.optimizer.schedule, self.train.steps),
            self._too_many_sequences(),
        )
        if found := [mismatch for mismatch in checked if mismatch]:
            raise MismatchError(found)
        return self

    def _memory_without_rows(self) -> Mismatch | None:
        if not carries_memory(self.model):
            return None
        if self.data.mixture or self.data.packing == "document":
            return Mismatch(
                "model.memory_length carries each row on into the next batch, which rows of a data.mixture or of "
                "data.packing document do not do; set it to 0, or read one corpus of concatenated documents",
                ("model.memory_length", "data.mixture", "data.packing"),
            )
        if self.data.lanes != self.train.global_batch:
            return Mismatch(
                f"model.memory_length carries each row on into the next batch, for which data.lanes "
                f"({self.data.lanes}) is to be train.global_batch ({self.train.global_batch})",
                ("data.lanes", "train.global_batch", "model.memory_length"),
            )
        return None

    def _muon_without_matrices(self) -> Mismatch | None:
        if self.optimizer.name != "muon" or self.engine.name == "ddp":
            return None
        return Mismatch(
            f"optimizer.name muon works on whole matrices, which engine.name {self.engine.name} cuts up; set the "
            "engine to ddp, or the optimizer to adamw",
            ("optimizer.name", "engine.name"),
        )

    def _too_many_sequences(self) -> Mismatch | None:
        sequences = self.train.steps * self.train.global_batch
        if sequences <= MOST_SEQUENCES:
            return None
        return Mismatch(
            f"train.steps ({self.train.steps}) times train.global_batch ({self.train.global_batch}) is "
            f"{sequences:.3g} sequences; a run can read {MOST_SEQUENCES:,} at most",
            ("train.steps", "train.global_batch"),
        )

    def warnings(self) -> list[Fault]:
        """Return what is allowed and yet is most often a slip."""
        train, found = self.train, optimizer_warnings(self.optimizer)
        if train.micro_batch > train.global_batch:
            text = f"train.micro_batch ({train.micro_batch}) is more than train.global_batch ({train.global_batch})"
            found.append(Fault("train.micro_batch", f"{text}, so a step is one pass over the global batch"))
        return found

    def as_tree(self) -> dict[str, Any]:
        """The whole tree as JSON values."""
        return self.model_dump(mode="json")

    def as_yaml(self) -> str:
        """The whole tree as a recipe that `load` reads back to the same config."""
        return yaml.dump(self.as_tree(), Dumper=_RecipeDumper, sort_keys=False)


class ConfigError(Exception):
    """A recipe or an override is wrong; a line for each fault."""

    def __init__(self, message: str, faults: Sequence[Fault] = ()) -> None:
        super().__init__(message)
        self.faults = faults or [Fault("", message)]


FieldPath = tuple[str, ...]

SCHEMA_TITLE = "Byteloom recipe"


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes, for editors."""
    schema = Config.model_json_schema()
    for name, family in families().items():
        if name != default_family():
            schema["$defs"][family.config.__name__].setdefault("required", []).append("family")
    return {**schema, "title": SCHEMA_TITLE}


def find(recipe: str | Path) -> Path:
    """Return the file of a recipe, given by the name of one that comes with Byteloom or by its path.

    Raises:
        ConfigError: no recipe has this name.
    """
    try:
        return find_recipe(str(recipe))
    except UnknownNameError as error:
        raise ConfigError(str(error)) from None


def load(recipe: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the config of a recipe, with `section.field=value` overrides laid over it.

    Args:
        recipe: its name or its path; see `find`.

    Raises:
        ConfigError: the recipe cannot be found or read, or a field or override is wrong.
    """
    origins: dict[FieldPath, str] = {}
    path = find(recipe)
    try:
        return _overridden(_read_yaml(path, origins), overrides, origins, str(path))
    except RecursionError as error:
        raise ConfigError(f"{path}: a value is nested too deeply, or is a part of itself") from error


def as_scalar(value: str) -> str:
    """Return a value as it is written in a recipe, in quotes where YAML would take it for something else."""
    return yaml.dump(value, Dumper=_RecipeDumper).splitlines()[0]


def with_overrides(tree: dict[str, Any], overrides: Sequence[str], source: str) -> Config:
    """The config of `Config.as_tree`, with overrides laid over it.

    Args:
        source: where the tree is kept, for errors.

    Raises:
        ConfigError: an override is wrong, or the tree is of another version.
    """
    return _overridden(copy.deepcopy(tree), overrides, {}, source)


def _overridden(tree: dict[str, Any], overrides: Sequence[str], origins: dict[FieldPath, str], source: str) -> Config:
    for override in overrides:
        _apply(override, tree, origins)
    return parse(tree, origins, source)


def parse(tree: dict[str, Any], origins: dict[FieldPath, str], source: str) -> Config:
    """The config of a tree of plain values.

    Args:
        origins: where each value came from, for errors.
        source: where the tree came from, for values that are missing.
    """
    unusable: dict[FieldPath, str] = {}
    usable = json.dumps(_usable(tree, (), unusable))
    try:
        # Strict, so that "50" is no number; by way of JSON, where a mapping is what a strict nested node expects.
        config, found = Config.model_validate_json(usable, strict=True), []
    except ValidationError as error:
        found = error.errors(include_url=False)
    faults = [_fault(path, f"{'.'.join(path)} {text}", origins, source) for path, text in unusable.items()]
    for each in found:
        cause = each.get("ctx", {}).get("error")
        path, parent = _place(each["loc"])
        if isinstance(cause, MismatchError):
            faults += [_mismatch(mismatch, origins, source) for mismatch in cause.found]
        elif not any(at[: len(path)] == path for at in unusable):  # nor of a section that lacks a value now
            faults.append(_described(each, path, parent, origins, source))
    if faults:
        raise ConfigError("\n".join(fault.text for fault in faults), faults)
    return config


def _usable(value: Any, path: FieldPath, unusable: dict[FieldPath, str]) -> Any:
    """Return a value of a tree, with null in the place of what no field takes; note there why, by its path."""
    fault = None
    if isinstance(value, dict):
        return {str(name): _usable(entry, (*path, str(name)), unusable) for name, entry in value.items()}
    if isinstance(value, list):
        return [_usable(entry, (*path, str(number)), unusable) for number, entry in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        fault = f"is {value}; it must be a finite number"
    elif isinstance(value, int) and abs(value) >= 2**63:
        fault = f"is {value:.3g}; it must be less than 2^63"
    elif isinstance(value, str) and not _is_utf8(value):
        fault = f"is {value!r}; it must be UTF-8 text"
    elif not isinstance(value, str | int | float | None):
        fault = f"is of the YAML type {type(value).__name__}; it must be a number, text, a list or a section"
    if fault is None:
        return value
    unusable[path] = fault
    return None


def _is_utf8(text: str) -> bool:
    """Return whether a text can be written as UTF-8; arguments of the command that are not have lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def explain(name: str) -> str:
    """What a dotted field or section means, with its type, default and bounds.

    Raises:
        ConfigError: there is no such field.
    """
    path = tuple(name.split("."))
    parents = [node for node in _nodes_at(path[:-1]) if path[-1] in node.model_fields]
    if not parents:
        nearest = difflib.get_close_matches(name, [".".join(p) for p, _ in all_fields(Config, ())], 1)
        raise ConfigError(f"{name} is not a field" + (f" (did you mean {nearest[0]}?)" if nearest else ""))
    nodes = _nodes_at(path)
    if not nodes:
        told = [(node.__name__, _explain_value(path, node.model_fields[path[-1]])) for node in parents]
        return told[0][1] if len(told) == 1 else "\n".join(f"In {where}:\n{text}" for where, text in told)
    sections = []
    for node in nodes:
        own = [_explain_field(".".join(p), field) for p, field in all_fields(node, path)]
        sections.append(f"{name}: {(node.__doc__ or '').strip()}\n\n" + "\n".join(own))
    return "\n\n".join(sections)


def _explain_value(path: FieldPath, field: FieldInfo) -> str:
    """A field, and the fields of each of its entries where it has such."""
    entries = _entries_of(field.annotation)
    each = all_fields(entries, (*path, "EACH")) if entries else ()
    return "\n".join(_explain_field(".".join(p), f) for p, f in [(path, field), *each])


def _explain_field(name: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else f"default {json.dumps(field.get_default())}"
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
    return f"{name}: {', '.join([_type_name(field.annotation), default, *bounds])}\n    {meaning}"


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) is typing.Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return " | ".join(map(_type_name, typing.get_args(annotation)))
    if entries := _entries_of(annotation):
        return f"{'mapping' if typing.get_origin(annotation) is dict else 'list'} of {entries.__name__}"
    return "null" if annotation is types.NoneType else str(getattr(annotation, "__name__", annotation))


def _entries_of(annotation: Any) -> type[BaseModel] | None:
    """The config class of the entries of a mapping by name, or of a list; None for anything else."""
    kinds = [kind for kind in typing.get_args(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return kinds[0] if typing.get_origin(annotation) in (dict, tuple) and kinds else None


def all_fields(node: type[BaseModel], path: FieldPath) -> Iterator[tuple[FieldPath, FieldInfo]]:
    """Every leaf field under a node, with its path; of a model, the fields of every family."""
    for name, field in node.model_fields.items():
        nodes = _classes(field.annotation)
        for inner in nodes:
            yield from all_fields(inner, (*path, name))
        if not nodes:
            yield (*path, name), field


def _classes(annotation: Any) -> list[type[BaseModel]]:
    """The config classes that a field may hold: one, or one for each family; none where it is a plain value."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _classes(arguments[0])
    return [node for member in arguments for node in _classes(member)] if origin is typing.Union else []


class _Walk:
    """Down a path from the root of the config: what may stand where it has come to."""

    def __init__(self) -> None:
        self.nodes: list[type[BaseModel]] = [Config]
        """Config classes; none where there is a plain value, a collection of nodes, or nothing."""
        self._entries: list[type[BaseModel]] = []

    def step(self, name: str) -> None:
        """Into a field, or an entry of a field that is a mapping by name or a list."""
        fields = [node.model_fields[name] for node in self.nodes if name in node.model_fields]
        self.nodes = self._entries or [node for field in fields for node in _classes(field.annotation)]
        self._entries = [entries for field in fields if (entries := _entries_of(field.annotation))]


def _nodes_at(path: FieldPath) -> list[type[BaseModel]]:
    """The config classes that may stand at a path; none where there is a plain value or nothing."""
    walk = _Walk()
    for name in path:
        walk.step(name)
    return walk.nodes


def _place(location: tuple[int | str, ...]) -> tuple[FieldPath, type[BaseModel]]:
    """Where a fault lies: its path, without the families that pydantic puts into it, and the class it belongs to."""
    path: FieldPath = ()
    parents: list[type[BaseModel]] = []
    walk = _Walk()
    for part in map(str, location):
        if len(walk.nodes) > 1:
            walk.nodes = [node for node in walk.nodes if node.model_fields["family"].default == part]
        else:
            path, parents = (*path, part), walk.nodes
            walk.step(part)
    return path, (parents or [Config])[0]


def _fault(path: FieldPath, text: str, origins: dict[FieldPath, str], source: str) -> Fault:
    return Fault(".".join(path), f"{_origin([path], origins) or source}: {text}")


def _mismatch(mismatch: Mismatch, origins: dict[FieldPath, str], source: str) -> Fault:
    origin = _origin([tuple(field.split(".")) for field in mismatch.fields], origins) or source
    return Fault(mismatch.fields[0], f"{origin}: {mismatch.text}")


def _described(
    fault: ErrorDetails, path: FieldPath, parent: type[BaseModel], origins: dict[FieldPath, str], source: str
) -> Fault:
    """Return what is wrong, where it came from and what is expected.

    Args:
        path: of the value.
        parent: the config class that the value is a field of.
    """
    kind, value = fault["type"], fault["input"]
    if kind == "union_tag_invalid":
        path, value = (*path, "family"), value["family"]
    name = ".".join(path)
    if kind == "extra_forbidden":
        hint = nearest(path[-1], list(parent.model_fields)) or f" (it has {', '.join(parent.model_fields)})"
        text = f"{name} is not a field of {parent.__name__}{hint}"
    elif kind == "missing":
        text = f"{name} is missing"
    elif kind == "value_error" and isinstance(value, dict):
        text = str(fault["ctx"]["error"])
        text = text if text.startswith(f"{name}.") else f"{name}: {text}"
    elif kind == "value_error":
        text = f"{name} is {describe_value(value)}; {fault['ctx']['error']}"
    else:
        text = f"{name} is {describe_value(value)}; {_expected(fault, path, parent, origins)}"
    return _fault(path, text, origins, source)


def _expected(fault: ErrorDetails, path: FieldPath, parent: type[BaseModel], origins: dict[FieldPath, str]) -> str:
    kind, value = fault["type"], fault["input"]
    if kind == "union_tag_invalid":
        return f"it must be {one_of(fault['ctx']['expected_tags'], value['family'])}"
    if kind == "union_tag_not_found":
        return "it must be a section, such as {family: …}"
    typed = (_origin([path], origins) or "").startswith("override ")
    if kind == "string_type" and typed and not isinstance(value, list | dict | None):
        # A shell takes quotes away; those within others stay.
        return f"""it must be text; in a shell: {".".join(path)}="'{value}'\""""
    field = parent.model_fields.get(path[-1])
    entries = _entries_of(field.annotation) if field else None
    section = next((_example(node) for node in [*_nodes_at(path), entries] if node), "")
    return describe_expected(fault, section=section, examples=field.examples or () if field else ())


def _example(node: type[BaseModel]) -> str:
    """Return a section with the fields that it must have, or with its first field."""
    names = [name for name, field in node.model_fields.items() if field.is_required()]
    return "{" + ", ".join(f"{name}: …" for name in names or list(node.model_fields)[:1]) + "}"


def _origin(paths: Sequence[FieldPath], origins: dict[FieldPath, str]) -> str | None:
    """Where values came from: the last override of one, or of what holds it or is in it; else a place in the file."""
    overrides = [
        origin
        for at, origin in origins.items()
        if origin.startswith("override ") and any(at[: len(path)] == path[: len(at)] for path in paths)
    ]
    if overrides:
        return overrides[-1]
    around = [path[:length] for path in paths for length in range(len(path) - 1, 0, -1)]
    return next((origins[path] for path in [*paths, *around] if path in origins), None)


def _apply(override: str, tree: dict[str, Any], origins: dict[FieldPath, str]) -> None:
    name, equals, text = override.partition("=")
    shown = f"override {shorten(override)}"
    if not equals or not name:
        raise ConfigError(f"{shown} is not of the form section.field=value")
    if not _is_utf8(override):
        raise ConfigError(f"{shown}: it is not UTF-8 text")
    *sections, last = path = tuple(name.split("."))
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{shown}: {section} is a value, not a section")
    try:
        node[last] = yaml.load(text, _RecipeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{shown}: the value is not YAML: {_first_line(error)}") from error
    for known in [known for known in origins if known[: len(path)] == path]:
        del origins[known]
    origins[path] = shown


MOST_DIGITS = 300
"""Of a whole number in a recipe. A float holds no more, and Python refuses to read more than 4,300."""


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.2's plain values: 3e-4 is a number, 010 is ten, and on, off, yes, no and dates are text."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 a table of the class, as in the base class

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        if len(text) > MOST_DIGITS:
            raise yaml.constructor.ConstructorError(None, None, "a number has too many digits", node.start_mark)
        return int(text)


class _RecipeDumper(yaml.SafeDumper):
    """Writes what _RecipeLoader reads: text that looks like a number to it is put in quotes."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 a table of the class, as in the base class


_RecipeLoader.add_constructor("tag:yaml.org,2002:int", _RecipeLoader.construct_yaml_int)
for _tag, _pattern, _first in (
    ("null", r"^(?:null|~|)$", ["n", "~", ""]),
    ("bool", r"^(?:true|false)$", list("tf")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
):
    for _class in (_RecipeLoader, _RecipeDumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _read_yaml(path: Path, origins: dict[FieldPath, str]) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a recipe: it is not UTF-8 text") from error
    try:
        loader = _RecipeLoader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path} is not a recipe: it has no sections")
        return _mapping(loader, root, (), path, origins)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not YAML: {_first_line(error)}") from error


def _mapping(
    loader: yaml.SafeLoader,
    node: yaml.MappingNode,
    path: FieldPath,
    file: Path,
    origins: dict[FieldPath, str],
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(loader.construct_object(key_node, deep=True))
        here = (*path, key)
        origin = f"{file}:{key_node.start_mark.line + 1}"
        if key in result:
            raise ConfigError(f"{origin}: {'.'.join(here)} is given twice, first at {origins[here]}")
        origins[here] = origin
        if isinstance(value_node, yaml.MappingNode):
            result[key] = _mapping(loader, value_node, here, file, origins)
        else:
            result[key] = loader.construct_object(value_node, deep=True)
    return result


def _first_line(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or error).partition("\n")[0]
