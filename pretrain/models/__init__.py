"""Model families, each in a file of its own, behind one interface (byte_model.py)."""

from pretrain.models.byte_model import ByteModel, Decoder
from pretrain.models.megabyte import Megabyte, MegabyteConfig

__all__ = ["FREE_FIELDS", "ByteModel", "Decoder", "ModelConfig", "build_model"]

ModelConfig = MegabyteConfig


FREE_FIELDS = {"dropout", "initial_std"}
"""Fields of a model that a run may change when it goes on: its weights mean the same without them."""


def build_model(config: ModelConfig) -> ByteModel:
    """The model of a config, its parameters drawn from torch's default generator."""
    return Megabyte(config)
