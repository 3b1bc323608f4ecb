"""Preparation of a model's blocks: activation checkpointing, compilation and float8."""

import torch
from torch import nn

from byteloom.core.packages import needed_by
from byteloom.core.torch_compat import set_activation_memory_budget
from pretrain.engines.config import CheckpointingConfig, EngineConfig
from pretrain.engines.engine import EngineError
from pretrain.models.adapters import AdaptedLinear, AdapterMap
from pretrain.models.base import ByteModel
from pretrain.models.blocks.unit import Unit

FLOAT8_CAPABILITY = (8, 9)
"""Lowest CUDA compute capability that multiplies in float8."""
FLOAT8_MULTIPLE = 16
"""Divisor that float8 products require of matrix dimensions."""


def prepare_blocks(config: EngineConfig, model: ByteModel, device: torch.device) -> None:
    """Set up blocks as a config says. Engines call it before they place, cast or shard parameters.

    The order matters: recomputed code is compiled, and gathers are neither recomputed nor compiled.

    Raises:
        EngineError: the model or the device does not support it.
    """
    if config.precision == "fp8":
        check_float8(device)
        multiply_in_float8(model)
    recompute(config.activation_checkpointing, model)
    for name, unit in named_units(model):
        unit.name = name
    if config.compile:
        checkpointing = config.activation_checkpointing
        # torch reads it when it compiles a block, in the first pass.
        set_activation_memory_budget(checkpointing.budget if checkpointing.mode == "budget" else 1.0)
        for unit in model.units():
            unit.compile(dynamic=False)  # shapes are few, and torch 2.13 fails on some as dynamic shapes


def named_units(model: ByteModel) -> list[tuple[str, Unit]]:
    """Return the blocks of a model by their names in it."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Unit)]


def recompute(config: CheckpointingConfig, model: ByteModel) -> None:
    """Set what each block of a model keeps for the backward pass.

    Raises:
        EngineError: the model has no such stack.
    """
    stacks = model.stacks()
    if unknown := [name for name in config.stacks if name not in stacks]:
        raise EngineError(
            f"engine.activation_checkpointing.stacks: the model has no stack {unknown[0]}; it has {', '.join(stacks)}"
        )
    for name, units in stacks.items():
        for number, unit in enumerate(units):
            chosen = number % config.every == 0 and (not config.stacks or name in config.stacks)
            if chosen and config.mode == "full":
                unit.keeps = "input"
            elif chosen and config.mode == "selective":
                unit.keeps = "products"


def check_float8(device: torch.device) -> None:
    """Check that a device multiplies in float8.

    Raises:
        EngineError: it does not.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device
        raise EngineError(
            f"engine.precision fp8 needs a CUDA device of compute capability "
            f"{'.'.join(map(str, FLOAT8_CAPABILITY))} or more, and {name} is not one; set it to bf16"
        )


def multiply_in_float8(model: ByteModel) -> None:
    """Replace the linear maps within blocks by torchao's, except those with adapters. Parameters and names stay.

    Raises:
        MissingPackageError: torchao is not installed.
    """
    with needed_by("engine.precision fp8", "torchao"):
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # noqa: PLC0415 not a dependency

    def fits(module: nn.Module, _: str) -> bool:
        if not isinstance(module, nn.Linear) or isinstance(module, AdaptedLinear | AdapterMap):
            return False
        return not any(size % FLOAT8_MULTIPLE for size in module.weight.shape)

    # Padded, because the gradient of a weight is a product over any number of positions.
    how = Float8LinearConfig(pad_inner_dim=True)
    for unit in model.units():
        convert_to_float8_training(unit, module_filter_fn=fits, config=how)
