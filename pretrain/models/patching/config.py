"""Configuration of the rules by which patches start."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from pretrain.models.patching.entropy import EntropyConfig
from pretrain.models.patching.patcher import Patcher
from pretrain.models.patching.rules import ByteClass, Fixed


class ByteClassConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Patches start at the ends of words: SpaceByte's rule (arXiv:2404.14408, section 3)."""

    name: Literal["byte_class"] = "byte_class"
    """Rule of the patches."""


class FixedConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Patches of one size."""

    name: Literal["fixed"] = "fixed"
    """Rule of the patches."""
    size: int = Field(ge=1)
    """Positions of a patch."""


PatcherConfig = Annotated[ByteClassConfig | FixedConfig | EntropyConfig, Field(discriminator="name")]
"""Rule by which patches start."""


def build_patcher(config: ByteClassConfig | FixedConfig, capacity: int) -> Patcher:
    """Return the rule of a config."""
    return ByteClass(capacity) if isinstance(config, ByteClassConfig) else Fixed(capacity, config.size)
