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

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, NamedTuple, TypeVar, Union, cast, get_args

from pydantic import BaseModel, Discriminator, Tag, TypeAdapter, ValidationError

from byteloom.core.errors import CorrectableError
from byteloom.core.registries.registry import Registry
from byteloom.core.text import count
from pretrain.models.base import ByteModel
from pretrain.models.blocks.multi_byte import MultiByteConfig
from pretrain.objectives import OBJECTIVES, Form, ObjectiveConfig, Visibility

PACKAGE = "pretrain.models.families"
"""Package that holds Byteloom's own families, one module each."""
AnyConfig = TypeVar("AnyConfig", bound=BaseModel)
HEAD_WIDTH = 64
"""Channels of an attention head in models of a `ModelSize`."""
USABLE = ({int}, {float}, {str}, {bool})
"""Types of the fields that usage options set, apart from None."""


class FamilyError(CorrectableError):
    """A model family is declared wrong, or a model is used in a way that its family does not support."""


def _carries_none(_: BaseModel) -> bool:
    return False


def _reads_any(_: BaseModel) -> None:
    return None


def _reads_causally(_: BaseModel) -> frozenset[Visibility]:
    return frozenset({Visibility.causal})


@dataclass(frozen=True)
class UsageOption:
    """Option of `eval` and `generate` that changes how a trained model is used. No parameter depends on it."""

    name: str
    """Name on the command line, without the hyphens in front: clamp-length."""
    field: str
    """Config field that it sets. The field's type is the option's: int, float, str or bool, or one of them or None."""
    help: str
    """One sentence for the help of the commands."""
    mode: str | None = None
    """Mode of evaluation that the option needs; None: it has an effect in every mode."""


class ModelSize(NamedTuple):
    """Size by which `byteloom recipe` chooses a model of any family."""

    width: int
    """Channels of the widest residual stream: a multiple of `HEAD_WIDTH`."""
    layers: int
    """Blocks of this width."""
    sequence_length: int

    def stack(self, parts: int = 1) -> dict[str, int]:
        """Return the width, layers and heads of a stack of a part of the width, whose heads have `HEAD_WIDTH`."""
        heads = max(1, self.width // HEAD_WIDTH // parts)
        return {"width": heads * HEAD_WIDTH, "layers": max(1, self.layers // parts), "heads": heads}


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
    """Config fields that a resumed run may change, because the function that the weights compute does not depend on
    them: dropout, first values, and the like. All others must stay. A name may be of a field of a section:
    patcher.model."""
    usage_options: tuple[UsageOption, ...] = ()
    """Options of the commands `eval` and `generate` for models of this family."""
    carries_memory: Callable[[AnyConfig], bool] = _carries_none
    """Whether a model of this config carries a memory from each training sequence to the next one of its lane."""
    image_of: Callable[[AnyConfig], tuple[int, int, int] | None] = _reads_any
    """Height, width and channels of the image, in raster order, that every sequence of a model of this config must be;
    None if it reads any bytes."""
    row_parts: Callable[[AnyConfig], int] | None = None
    """Number of equal parts into which ranks can cut a row of a model of this config; engine.context must divide it.
    None: the family does not support context parallelism."""
    visibilities: Callable[[AnyConfig], frozenset[Visibility]] = _reads_causally
    """Visibilities of the examples that a model of this config reads, and so the objectives that can train it."""
    is_default: bool = False
    """Whether this is the family of a recipe that names none."""
    reference: Path | None = None
    """Python file with the forward pass in plain torch, which exports carry as model.py; see `references`. Its class
    `Model` takes the section `model` of a recipe and the weights by name. Its `logits` maps the arguments of a forward
    pass to the logits of the ids that are scored. None: exports have no model.py."""
    of_size: Callable[[ModelSize], Mapping[str, Any]] | None = None
    """Config fields, besides the defaults, of a model of a size. None: `byteloom recipe` refuses the family."""
    small: Mapping[str, Any] = field(default_factory=dict)
    """Config fields, besides the defaults, of a model that is small enough to check in seconds (`check-family`)."""

    @property
    def usage_fields(self) -> frozenset[str]:
        """Config fields that the usage options set."""
        return frozenset(option.field for option in self.usage_options)

    def type_of(self, option: UsageOption) -> type:
        """Return the type of a usage option's value."""
        annotation = self.config.model_fields[option.field].annotation
        (kind,) = {*(get_args(annotation) or (annotation,))} - {type(None)}
        return cast(type, kind)


FAMILIES: Registry[Family[Any]] = Registry("model family", "byteloom.families", PACKAGE)


def register_family(family: Family[AnyConfig]) -> Family[AnyConfig]:
    """Add a family, and return it.

    Raises:
        RegistryError: the name is taken.
        FamilyError: the declaration is wrong.
    """
    _check_declaration(family)
    FAMILIES.register(family.name, family)
    return family


def all_families() -> dict[str, Family[Any]]:
    """Return all usable families by name. Log a warning for each that cannot be used."""
    return _in_order(FAMILIES.entries())


def family(name: str) -> Family[Any]:
    """Return a family.

    Raises:
        RegistryError: there is no family of this name, or it cannot be used.
    """
    return FAMILIES.get(name)


def default_family() -> str:
    """Return the family of a model section that names none."""
    (name,) = (name for name, family in FAMILIES.usable().items() if family.is_default)
    return name


def _in_order(families: Mapping[str, Family[Any]]) -> dict[str, Family[Any]]:
    """Return Byteloom's own families in alphabetical order, then those of other packages."""
    return dict(sorted(families.items(), key=lambda item: (not _is_own(item[1]), item[0])))


def _is_own(family: Family[Any]) -> bool:
    return family.config.__module__.startswith(f"{PACKAGE}.")


def _check_declaration(family: Family[Any]) -> None:
    """Raise FamilyError if a family declares what its config does not have."""
    fields, place = family.config.model_fields, f"{family.config.__module__}.{family.config.__name__}"
    if family.is_default and not _is_own(family):
        raise FamilyError(f"{place} declares the model family {family.name} the default; only Byteloom has a default")
    if "family" not in fields or fields["family"].default != family.name:
        raise FamilyError(f'{place} has no field family: Literal["{family.name}"] = "{family.name}"')
    if "sequence_length" not in fields:
        raise FamilyError(f"{place} has no field sequence_length, which every model family has")
    for declared, names in (("free_fields", family.free_fields), ("usage_options", family.usage_fields)):
        if unknown := sorted({name.partition(".")[0] for name in names} - fields.keys()):
            raise FamilyError(f"{declared} of the model family {family.name}: {place} has no field {unknown[0]}")
    for option in family.usage_options:
        if {*(get_args(annotation := fields[option.field].annotation) or (annotation,))} - {type(None)} not in USABLE:
            raise FamilyError(
                f"usage_options of the model family {family.name}: {place}.{option.field} is not of type int, float, "
                "str or bool"
            )


def _family_named_by(tree: Any) -> Any:
    """Return the family that a recipe's section or a config names; None if it is neither.

    Raises:
        RegistryError: an entry point names this family, and it cannot be used.
    """
    name = tree.get("family", default_family()) if isinstance(tree, Mapping) else getattr(tree, "family", None)
    return FAMILIES.get(name).name if name in FAMILIES.names() else name


@cache
def _config_union() -> Any:
    """Return the type of the config of any family: a pydantic union that the field `family` discriminates."""
    members = tuple(Annotated[entry.config, Tag(name)] for name, entry in _in_order(FAMILIES.usable()).items())
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
        RegistryError: an entry point names its family, and it cannot be used.
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
        RegistryError: there is no family of this name, or it cannot be used.
    """
    return model_config({"family": name, **family(name).small, **changes})


def carries_memory(config: "ModelConfig") -> bool:
    """Return whether a model carries a memory from each training sequence to the next one of its lane."""
    return family(config.family).carries_memory(config)


def image_of(config: "ModelConfig") -> tuple[int, int, int] | None:
    """Return height, width and channels of the image that every sequence must be; None if a model reads any bytes."""
    return family(config.family).image_of(config)


def row_parts(config: "ModelConfig") -> int | None:
    """Return the number of equal parts into which ranks can cut a row; None if the family does not support it."""
    parts = family(config.family).row_parts
    return None if parts is None else parts(config)


def form_of(config: "ModelConfig", objective: ObjectiveConfig) -> Form:
    """Return the form in which an objective shows rows to a model.

    Raises:
        FamilyError: the objective does not train models of this family, or not a model of this config.
    """
    supported = family(config.family).visibilities(config)
    chosen = next((each for each in objective.entry.visibilities if each in supported), None)
    if chosen is None:
        fitting = [name for name, entry in OBJECTIVES.entries().items() if not supported.isdisjoint(entry.visibilities)]
        raise FamilyError(
            f"objective.name {objective.name} does not train this model of family {config.family}; "
            f"{' or '.join(fitting) or 'no objective'} does"
        )
    needed = objective.entry.special_ids(objective, config.sequence_length)
    if needed > getattr(config, "special_ids", 0):
        raise FamilyError(
            f"objective.name {objective.name} uses {count(needed, 'id')} beyond the vocabulary for rows of "
            f"{config.sequence_length:,} ids, and model.special_ids is {getattr(config, 'special_ids', 0)}; set it to "
            f"{needed}"
        )
    if chosen is not Visibility.encoder_decoder:
        return Form(chosen, config.sequence_length, 0)
    form = Form(chosen, getattr(config, "target_length"), getattr(config, "source_length"))  # noqa: B009 of its config
    if objective.entry.lengths is not None:
        target, source = objective.entry.lengths(objective, config.sequence_length)
        if target > form.length or source > form.source_length:
            raise FamilyError(
                f"objective.name {objective.name} makes targets of {target} and sources of {source} ids of rows of "
                f"{config.sequence_length:,} ids; set model.target_length to {target} and model.source_length to "
                f"{source}, at least"
            )
    return form


def build_model(config: "ModelConfig") -> ByteModel:
    """Return the model of a config. Its parameters are drawn from torch's default generator."""
    model = family(config.family).build(config)
    if (multi_byte := multi_byte_of(config)) is not None:
        model.predict_further(multi_byte)
    return model


def multi_byte_of(config: "ModelConfig") -> MultiByteConfig | None:
    """Return the heads of multi-byte prediction of a model; None if it has none, or its family has no such option."""
    return getattr(config, "multi_byte", None)


def with_usage_options(config: "ModelConfig", given: Mapping[str, Any]) -> "ModelConfig":
    """Return the config of a trained model that is used with options.

    Args:
        config: of the trained model.
        given: values by the names of usage options.

    Raises:
        FamilyError: the family does not declare an option, or a value is wrong.
    """
    fields = {option.name: option.field for option in family(config.family).usage_options}
    for name in given:
        if name not in fields:
            takes = f"it takes {', '.join(f'--{known}' for known in fields)}" if fields else "it takes no such option"
            raise FamilyError(f"a {config.family} model takes no --{name}; {takes}")
    if not given:
        return config
    try:
        return type(config).model_validate(config.model_dump() | {fields[name]: value for name, value in given.items()})
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        shown = " ".join(f"--{name} {value}" for name, value in given.items())
        raise FamilyError(f"{shown}: {fault.get('ctx', {}).get('error', fault['msg'])}") from error


def usage_of(config: "ModelConfig") -> dict[str, Any]:
    """Return the value of each usage option of a model's family, by the option's name."""
    return {option.name: getattr(config, option.field) for option in family(config.family).usage_options}


def options_by_name() -> dict[str, list[tuple[Family[Any], UsageOption]]]:
    """Return the families that declare each usage option, with their declarations, by the option's name."""
    found: dict[str, list[tuple[Family[Any], UsageOption]]] = {}
    for entry in _in_order(FAMILIES.usable()).values():
        for option in entry.usage_options:
            found.setdefault(option.name, []).append((entry, option))
    return found
