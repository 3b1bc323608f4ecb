"""Scaling of a run's model from its base model."""

import torch
from pydantic import ValidationError

from byteloom.core.mappings import laid_over
from byteloom.core.text import printable
from pretrain.models import ByteModel, ModelConfig, build_model, model_config
from pretrain.models.scaling import ScalingError, scales
from pretrain.optim.config import OptimizerConfig


def scale_model(model: ByteModel, config: ModelConfig, optimizer: OptimizerConfig) -> ByteModel:
    """Set the scales of a model as `optimizer.scaling` says, before an engine takes it, and return it.

    Args:
        model: of the config.
        config: section `model` of the recipe.
        optimizer: section `optimizer` of the recipe.

    Raises:
        ScalingError: the model cannot be scaled from the base model.
    """
    if optimizer.scaling == "mup":
        with torch.device("meta"):
            base = build_model(base_config(config, optimizer))
        model.scales = scales(model, base)
    return model


def base_config(config: ModelConfig, optimizer: OptimizerConfig) -> ModelConfig:
    """Return the config of the base model.

    Raises:
        ScalingError: `optimizer.base` is no change of the section `model`.
    """
    tree = laid_over(config.model_dump(), optimizer.base)
    try:
        return model_config(tree)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(map(str, ("optimizer.base", *fault["loc"][1:])))
        if fault["type"] == "extra_forbidden":
            raise ScalingError(f"{place} is not a field of the section model") from error
        raise ScalingError(f"{place}: {printable(str(fault.get('ctx', {}).get('error', fault['msg'])))}") from error
