"""Model families, each in a file of its own, behind one interface (byte_model.py)."""

from pretrain.models.byte_model import ByteModel, Decoder
from pretrain.models.megabyte import Megabyte, MegabyteConfig

__all__ = ["ByteModel", "Decoder", "ModelConfig", "build_model"]

ModelConfig = MegabyteConfig


def build_model(config: ModelConfig) -> ByteModel:
    """The model of a config, its parameters drawn from torch's default generator."""
    return Megabyte(config)
