"""Fine-tuning: parameters that a run leaves as they are, and adapters, both by patterns of names.

    model ─▶ adapters added to its linear layers ─▶ parameters frozen, by `requires_grad` ─▶ engine, optimizer

A pattern is a shell pattern, whose * also matches dots. It stands for all names that it matches, and for what is within
the modules that it matches: `stack.blocks.0` is all of block 0.
"""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from pydantic import BaseModel, Field

from byteloom.core.errors import CorrectableError
from byteloom.core.validation import nearest
from pretrain.models.adapters import adapt, layer_of_adapter, linear_layers
from pretrain.models.base import ByteModel
from pretrain.models.registry import ModelConfig, build_model

SECTION = "finetune"
"""Name of the section in recipes."""


class FinetuneError(CorrectableError):
    """A section `finetune` does not fit its model.

    Attributes:
        field: dotted name of the field within the section.
    """

    def __init__(self, field: str, text: str) -> None:
        super().__init__(f"{SECTION}.{field} {text}")
        self.field = field


class AdaptersConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Low-rank adapters of linear layers. With one, a layer computes W x + (alpha / rank) B A x (Hu et al. 2021)."""

    layers: tuple[str, ...] = ()
    """Patterns of the names of linear layers, or of modules such as "*.attention". [] is none. Freeze the weights that
    are adapted, or all: `finetune.freeze` "*"."""
    rank: int = Field(default=8, ge=1)
    """Rank of B A, at most the width of the layer."""
    alpha: float = Field(default=16.0, gt=0)
    """Scale of the adapters times the rank. With the same alpha, another rank needs about the same learning rate."""


class FinetuneConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Parameters that the run trains. A pattern matches names; * matches any text, and a module means all within it."""

    freeze: tuple[str, ...] = ()
    """Patterns of the names of parameters that keep their values, such as "embedding". They have no gradient and no
    moments. "*" is all, and "stack.blocks.0" is all of a block. Adapters are never frozen."""
    train: tuple[str, ...] = ()
    """Patterns of the names of parameters that are trained though `freeze` matches them."""
    adapters: AdaptersConfig = AdaptersConfig()

    @property
    def is_used(self) -> bool:
        """Return whether the section changes anything."""
        return bool(self.freeze or self.train or self.adapters.layers)


def finetune_of(recipe: Mapping[str, Any]) -> FinetuneConfig:
    """Return the section of a stored recipe. Earlier versions of Byteloom had none."""
    return FinetuneConfig.model_validate(recipe.get(SECTION, {}))


def build_finetuned(config: ModelConfig, finetune: FinetuneConfig) -> ByteModel:
    """Return the model of a config with the adapters of a section, and with parameters frozen.

    Raises:
        FinetuneError: the section does not fit the model.
    """
    model = build_model(config)
    apply(finetune, model)
    return model


def apply(config: FinetuneConfig, model: ByteModel) -> None:
    """Add adapters to a model, and freeze parameters, in place.

    Raises:
        FinetuneError: a pattern matches nothing, a rank is more than a layer's width, or no parameter is trained.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen = matching("freeze", config.freeze, names)
    kept = matching("train", config.train, names)
    if unfrozen := [pattern for pattern in config.train if not frozen & _matches(pattern, names)]:
        raise FinetuneError("train", f"has {unfrozen[0]!r}, which {SECTION}.freeze does not freeze; remove it")
    _add_adapters(config.adapters, model)
    trained = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen - kept)
        trained += parameter.requires_grad
    if not trained:
        raise FinetuneError("freeze", "freezes every parameter; name some in finetune.train, or add adapters")


def _add_adapters(config: AdaptersConfig, model: ByteModel) -> None:
    layers, fused = linear_layers(model), model.fused_matrices()
    for name in sorted(matching("adapters.layers", config.layers, list(layers), "linear layer")):
        layer = layers[name]
        if config.rank > (width := min(layer.in_features, layer.out_features)):
            raise FinetuneError("adapters.rank", f"is {config.rank}, and {name} has only {width} features")
        adapt(layer, config.rank, config.alpha, fused.get(f"{name}.weight", 1))


def matching(field: str, patterns: Sequence[str], names: Sequence[str], kind: str = "parameter") -> set[str]:
    """Return the names that patterns match.

    Raises:
        FinetuneError: a pattern matches none.
    """
    found: set[str] = set()
    for pattern in patterns:
        own = _matches(pattern, names)
        if not own:
            near = nearest(pattern, _known_patterns(names)) or f" (there is {names[0]}, for example)"
            raise FinetuneError(field, f"has {pattern!r}, which matches no {kind} of this model{near}")
        found |= own
    return found


def _matches(pattern: str, names: Iterable[str]) -> set[str]:
    return {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}


def _known_patterns(names: Sequence[str]) -> list[str]:
    """Return patterns that a wrong one may mean: names, modules and ends of names, with * for numbers."""
    known: dict[str, None] = dict.fromkeys(names)
    for name in names:
        parts = name.split(".")
        general = ["*" if part.isdecimal() else part for part in parts]
        for end in range(1, len(parts) + 1):
            known |= dict.fromkeys([".".join(parts[:end]), ".".join(general[:end])])
            known |= dict.fromkeys(".".join(["*", *general[begin:end]]) for begin in range(1, end))
    return list(known)


def unfrozen_layers(model: ByteModel) -> list[str]:
    """Return the weights that have adapters and are trained too, which is most often a mistake."""
    trained = model.trained_parameters()
    adapted = {layer_of_adapter(name) for name in trained} - {None}
    return sorted(name for name in trained if name in adapted)
