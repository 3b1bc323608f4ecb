"""Models: bytes in, negative log-likelihood of every byte out.

registry.py   model families by name, and the config of a model
base.py       ByteModel, the contract of every family
families/     one file each
blocks/       modules that families share
"""

from typing import TYPE_CHECKING, Any

from pretrain.models import registry
from pretrain.models.base import ByteModel, Decoder, EncodingDecoder, RewindingDecoder
from pretrain.models.blocks.attention import describe_attention
from pretrain.models.registry import (
    Family,
    FamilyError,
    UsageOption,
    all_families,
    build_model,
    carries_memory,
    default_family,
    family,
    form_of,
    image_of,
    model_config,
    multi_byte_of,
    register_family,
    row_parts,
    small_config,
    usage_of,
    with_usage_options,
)

if TYPE_CHECKING:
    from pretrain.models.registry import ModelConfig
else:

    def __getattr__(name: str) -> Any:
        """Return `ModelConfig`, which the registry makes when it is first read."""
        if name == "ModelConfig":
            return registry.ModelConfig
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ByteModel",
    "Decoder",
    "EncodingDecoder",
    "Family",
    "FamilyError",
    "ModelConfig",
    "RewindingDecoder",
    "UsageOption",
    "all_families",
    "build_model",
    "carries_memory",
    "default_family",
    "describe_attention",
    "family",
    "form_of",
    "image_of",
    "model_config",
    "multi_byte_of",
    "register_family",
    "row_parts",
    "small_config",
    "usage_of",
    "with_usage_options",
]
