"""Registry of model families.

A family is one file, which registers itself:

    FAMILY = register_family(Family(name="gru", config=GRUConfig, build=GRU, free_fields=frozenset({"dropout"})))

The registry finds Byteloom's families by importing every module of pretrain/models/families. It finds the families of
other packages by the entry point group `byteloom.families`. The name of an entry point is the name of its family, and
importing the module that it names registers the family:

    [project.entry-points."byteloom.families"]
    gru = "their_package.gru"

An entry point that cannot be used is reported when its family is requested, or when families are listed. Other
families work without it.
"""

import importlib
import logging
import pkgutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar, Union

from pydantic import BaseModel, Discriminator, Tag, TypeAdapter, ValidationError

from byteloom.core.validation import nearest
from pretrain.models.base import ByteModel

log = logging.getLogger(__name__)

PACKAGE = "pretrain.models.families"
"""Package that holds Byteloom's own families, one module each."""
GROUP = "byteloom.families"
"""Entry point group of the families of other packages."""

AnyConfig = TypeVar("AnyConfig", bound=BaseModel)


class FamilyError(Exception):
    """A model family cannot be registered, or cannot be used."""


def _carries_none(_: BaseModel) -> bool:
    return False


@dataclass(frozen=True)
class Family(Generic[AnyConfig]):
    """A model family, as its file declares it."""

    name: str
    """Value of `model.family` in a recipe; unique."""
    config: type[AnyConfig]
    """Section `model` of a recipe. It has the fields `family`, whose default is the name, and `sequence_length`."""
    build: Callable[[AnyConfig], ByteModel]
    """Builds a model whose parameters are drawn from torch's default generator."""
    free_fields: frozenset[str] = frozenset()
    """Config fields that a resumed run may change, because they do not change what the weights mean."""
    usage_fields: frozenset[str] = frozenset()
    """Config fields that may be changed when a trained model is used, because no parameter depends on them. The
    commands eval and generate take an option for them."""
    carries_memory: Callable[[AnyConfig], bool] = _carries_none
    """Whether a model of this config carries a memory from each training sequence to the next one of its lane."""
    is_default: bool = False
    """Whether a recipe that names no family means this one."""
    small: Mapping[str, Any] = field(default_factory=dict)
    """Config fields, besides the defaults, of a model that is small enough to check in seconds (`check-family`)."""


class FamilyRegistry:
    """Families by name: those of a package's modules, and those of an entry point group."""

    def __init__(self, package: str, group: str) -> None:
        self._package, self._group = package, group
        self._families: dict[str, Family[Any]] = {}
        self._unusable: dict[str, FamilyError] = {}
        """Families that entry points name and that cannot be used, with the reason."""
        self._is_loaded = False

    def register(self, family: Family[AnyConfig]) -> Family[AnyConfig]:
        """Add a family, and return it.

        Raises:
            FamilyError: the name is taken, or the declaration is wrong.
        """
        if family.name in self._families:
            owner = self._families[family.name].config.__module__
            raise FamilyError(
                f"{family.config.__module__} registers the model family {family.name}, which {owner} has registered"
            )
        _check_declaration(family)
        for other in self._families.values():
            if family.is_default and other.is_default:
                raise FamilyError(f"the model family {family.name} is declared the default, which {other.name} is")
        self._families[family.name] = family
        return family

    def all_families(self) -> dict[str, Family[Any]]:
        """Return all usable families by name. Log a warning for each that cannot be used."""
        usable = self.usable()
        for error in self._unusable.values():
            log.warning("%s", error)
        return usable

    def usable(self) -> dict[str, Family[Any]]:
        """Return all usable families by name: Byteloom's own in alphabetical order, then those of other packages."""
        self.load()
        return dict(sorted(self._families.items(), key=lambda item: (not self._is_own(item[1]), item[0])))

    def family(self, name: str) -> Family[Any]:
        """Return a family.

        Raises:
            FamilyError: there is no family of this name, or it cannot be used.
        """
        self.load()
        self.refuse_unusable(name)
        if name not in self._families:
            known = list(self.usable())
            hint = nearest(name, known) or f"; the families are {', '.join(known)}"
            raise FamilyError(f"{name} is not a model family{hint}")
        return self._families[name]

    def refuse_unusable(self, name: object) -> None:
        """Raise the FamilyError of a family that an entry point names and that cannot be used."""
        if isinstance(name, str) and name in self._unusable:
            raise self._unusable[name]

    def default(self) -> str:
        """Return the family of a model section that names none."""
        return next(name for name, family in self.usable().items() if family.is_default)

    def load(self) -> None:
        """Import all families once: Byteloom's own, then those of other packages."""
        if self._is_loaded:
            return
        self._is_loaded = True
        try:
            self._load_own()
        except BaseException:
            self._is_loaded = False
            raise
        found: dict[str, list[EntryPoint]] = defaultdict(list)
        for entry in sorted(entry_points(group=self._group), key=lambda entry: (entry.name, _package_of(entry))):
            found[entry.name].append(entry)
        for name, entries in found.items():
            try:
                self._load_entry(name, entries)
            except FamilyError as error:
                self._unusable[name] = error

    def _is_own(self, family: Family[Any]) -> bool:
        return family.config.__module__.startswith(f"{self._package}.")

    def _load_own(self) -> None:
        package = importlib.import_module(self._package)
        for name in sorted(module.name for module in pkgutil.iter_modules(package.__path__)):
            importlib.import_module(f"{self._package}.{name}")

    def _load_entry(self, name: str, entries: list[EntryPoint]) -> None:
        """Import the module that registers a family.

        Args:
            name: of the family.
            entries: all entry points of this name.
        """
        packages = " and ".join(_package_of(entry) for entry in entries)
        is_own = name in self._families and self._is_own(self._families[name])
        if is_own or len(entries) > 1:
            owners = f"Byteloom and {packages}" if is_own else packages
            raise FamilyError(f"the model family {name} is registered by {owners}; remove all but one")
        where = f"the entry point {name} = {entries[0].value} of the package {packages} (group {self._group})"
        try:
            entries[0].load()
        except Exception as error:
            raise FamilyError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from error
        if name not in self._families:
            raise FamilyError(f"{where} registers no model family named {name}")


def _package_of(entry: EntryPoint) -> str:
    """Return the name of the distribution package that declares an entry point."""
    return entry.dist.name if entry.dist is not None else "unknown"


def _check_declaration(family: Family[Any]) -> None:
    """Raise FamilyError if a family declares what its config does not have."""
    fields, place = family.config.model_fields, f"{family.config.__module__}.{family.config.__name__}"
    if "family" not in fields or fields["family"].default != family.name:
        raise FamilyError(f'{place} has no field family: Literal["{family.name}"] = "{family.name}"')
    if "sequence_length" not in fields:
        raise FamilyError(f"{place} has no field sequence_length, which every model family has")
    for declared, names in (("free_fields", family.free_fields), ("usage_fields", family.usage_fields)):
        if unknown := sorted(names - fields.keys()):
            raise FamilyError(f"{declared} of the model family {family.name}: {place} has no field {unknown[0]}")


_REGISTRY = FamilyRegistry(PACKAGE, GROUP)
register_family = _REGISTRY.register
all_families = _REGISTRY.all_families
family = _REGISTRY.family
default_family = _REGISTRY.default


def _family_named_by(tree: Any) -> Any:
    """Return the family that a recipe's section or a config names; None if it is neither.

    Raises:
        FamilyError: an entry point names this family, and it cannot be used.
    """
    name = tree.get("family", default_family()) if isinstance(tree, Mapping) else getattr(tree, "family", None)
    _REGISTRY.refuse_unusable(name)
    return name


@cache
def _config_union() -> Any:
    """Return the type of the config of any family: a pydantic union that the field `family` discriminates."""
    members = tuple(Annotated[entry.config, Tag(name)] for name, entry in _REGISTRY.usable().items())
    return Annotated[Union[members], Discriminator(_family_named_by)]  # noqa: UP007 its members are a tuple


if TYPE_CHECKING:

    class ModelConfig(BaseModel, frozen=True):
        """Config of a model of any family."""

        family: str
        """Name of the family."""
        sequence_length: int
        """Longest context, in bytes."""

else:

    def __getattr__(name: str) -> Any:
        """Make `ModelConfig` when it is first read, so that a family's module can import this one."""
        if name == "ModelConfig":
            return _config_union()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def model_config(tree: Mapping[str, Any]) -> "ModelConfig":
    """Return the config of a model from the section `model` of a recipe.

    Raises:
        pydantic.ValidationError: the section is wrong.
        FamilyError: an entry point names its family, and it cannot be used.
    """
    config: ModelConfig = _adapter().validate_python(tree)
    return config


@cache
def _adapter() -> TypeAdapter[Any]:
    return TypeAdapter(_config_union())


def small_config(name: str, **changes: Any) -> "ModelConfig":
    """Return the config of a family's small model.

    Args:
        name: of the family.
        changes: other values of config fields.

    Raises:
        pydantic.ValidationError: the family declares no valid small model, or a changed value is wrong.
        FamilyError: there is no family of this name, or it cannot be used.
    """
    return model_config({"family": name, **family(name).small, **changes})


def carries_memory(config: "ModelConfig") -> bool:
    """Return whether a model carries a memory from each training sequence to the next one of its lane."""
    return family(config.family).carries_memory(config)


def build_model(config: "ModelConfig") -> ByteModel:
    """Return the model of a config. Its parameters are drawn from torch's default generator."""
    return family(config.family).build(config)


def change_usage_fields(config: "ModelConfig", changes: Mapping[str, Any]) -> "ModelConfig":
    """Return a config with other values of fields that no parameter depends on.

    Args:
        config: of a trained model.
        changes: new values by field.

    Raises:
        FamilyError: the family does not declare a field in `usage_fields`, or a value is wrong.
    """
    for name in changes:
        if name not in family(config.family).usage_fields:
            raise FamilyError(f"a {config.family} model takes no {name}")
    try:
        return type(config).model_validate(config.model_dump() | dict(changes))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise FamilyError(str(fault.get("ctx", {}).get("error", fault["msg"]))) from error
