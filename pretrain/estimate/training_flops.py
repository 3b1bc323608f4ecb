"""Floating-point operations of a training step of a model, some of whose parameters may be frozen.

    every parameter is trained     `ByteModel.step_flops`: the forward pass, and two products for each one
    some are frozen                the same, less the products of gradients that nothing trained needs

A product needs the gradient of its input if something before it is trained, and that of its weight if this is trained.
Autograd knows which. Both backward passes run on the meta device, and torch's counter adds up their products.
"""

import torch

from pretrain.estimate.activations import mean_loss, on_meta
from pretrain.models import ByteModel, ModelConfig
from pretrain.models.finetune import FinetuneConfig


def training_flops(model: ByteModel, config: ModelConfig, finetune: FinetuneConfig) -> int:
    """Return the operations of the forward and the backward pass over a row of full length, without recomputation.

    Args:
        model: of the config, with adapters; on any device.
        config: of the model.
        finetune: its frozen parameters and adapters.
    """
    whole = model.step_flops(config.sequence_length)
    if not finetune.is_used:
        return whole
    own, trained = on_meta(config, finetune), on_meta(config, finetune).requires_grad_()
    return whole - (counted_flops(trained) - counted_flops(own))


def counted_flops(model: ByteModel) -> int:
    """Return the operations of a training pass over a row of full length, as torch counts them, with recomputation.

    Args:
        model: on the meta device.
    """
    from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415 only fine-tunings count so

    ids = torch.empty(1, model.sequence_length, dtype=torch.int16, device="meta")
    with FlopCounterMode(display=False) as counter:
        mean_loss(model, ids).backward()
    return counter.get_total_flops()
