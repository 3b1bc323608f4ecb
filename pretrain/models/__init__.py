"""Model families, each in a file of its own, behind one interface (byte_model.py)."""

from collections.abc import Mapping
from typing import Annotated, Any, get_args

from pydantic import BaseModel, Discriminator, Tag, TypeAdapter

from pretrain.models.base import ByteModel, Decoder
from pretrain.models.blocks.layers import describe_attention
from pretrain.models.families.megabyte import Megabyte, MegabyteConfig
from pretrain.models.families.perceiver_ar import PerceiverAR, PerceiverARConfig
from pretrain.models.families.transformer import Transformer, TransformerConfig
from pretrain.models.families.transformer_xl import TransformerXL, TransformerXLConfig

__all__ = [
    "DEFAULT_FAMILY",
    "FREE_FIELDS",
    "ByteModel",
    "Decoder",
    "ModelConfig",
    "PerceiverARConfig",
    "build_model",
    "carries_memory",
    "describe_attention",
    "families",
    "model_config",
]


DEFAULT_FAMILY = "megabyte"
"""Family of a model section that names none."""


def _family_of(tree: Any) -> Any:
    """Return the family of a recipe's section or of a config; None where it is neither."""
    return tree.get("family", DEFAULT_FAMILY) if isinstance(tree, Mapping) else getattr(tree, "family", None)


ModelConfig = Annotated[
    Annotated[MegabyteConfig, Tag("megabyte")]
    | Annotated[PerceiverARConfig, Tag("perceiver_ar")]
    | Annotated[TransformerConfig, Tag("transformer")]
    | Annotated[TransformerXLConfig, Tag("transformer_xl")],
    Discriminator(_family_of),
]
"""The config of one family, told apart by `family`."""

FREE_FIELDS = {
    "dropout",
    "initial_std",
    "latents",
    "cross_attend_dropout",
    "zero_head",
    "cropping",
    "minimum_crop",
}
"""Fields of a model that a run may change when it goes on: its weights mean the same without them."""


def families() -> dict[str, type[BaseModel]]:
    """The name of every family, with its config."""
    union, _ = get_args(ModelConfig)
    return {tag.tag: config for config, tag in map(get_args, get_args(union))}


def model_config(tree: Mapping[str, Any]) -> ModelConfig:
    """The config of a model from its section of a recipe, which has been checked before.

    Raises:
        pydantic.ValidationError: it is wrong.
    """
    return TypeAdapter(ModelConfig).validate_python(tree)


def carries_memory(config: ModelConfig) -> bool:
    """Whether the model of a config carries a memory from each training sequence to the next one of its lane."""
    return isinstance(config, TransformerXLConfig) and config.memory_length > 0


def build_model(config: ModelConfig) -> ByteModel:
    """The model of a config, its parameters drawn from torch's default generator."""
    match config:
        case MegabyteConfig():
            return Megabyte(config)
        case PerceiverARConfig():
            return PerceiverAR(config)
        case TransformerConfig():
            return Transformer(config)
        case TransformerXLConfig():
            return TransformerXL(config)
