"""Floating-point operations of training steps with frozen parameters."""

from typing import Any

import pytest

from pretrain.estimate.activations import on_meta
from pretrain.estimate.training_flops import counted_flops, training_flops
from pretrain.models import ByteModel, small_config
from pretrain.models.finetune import FinetuneConfig


def weights(model: ByteModel, beginning: str) -> int:
    """Return the operations of one product of a row with all matrices within a module."""
    named = model.named_parameters()
    return 2 * model.sequence_length * sum(p.numel() for n, p in named if n.startswith(beginning) and p.ndim == 2)


def recomputed(model: ByteModel) -> int:
    """Return the operations of the logits, which the backward pass computes again."""
    return 2 * model.sequence_length * model.head_weights()[0].numel()


@pytest.mark.parametrize("family", ["transformer", "spacebyte", "encoder"])
def test_nothing_frozen_costs_three_forward_passes_as_torch_counts_them(family: str):
    config = small_config(family)
    model = on_meta(config)
    assert training_flops(model, config, FinetuneConfig()) == 3 * model.flops(config.sequence_length)
    assert counted_flops(model) - recomputed(model) == 3 * model.flops(config.sequence_length)


def cost(**fields: Any) -> tuple[ByteModel, int]:
    """Return a Transformer of three layers that is fine-tuned, and the operations of its training, as torch counts."""
    config, finetune = small_config("transformer", layers=3), FinetuneConfig.model_validate(fields)
    model = on_meta(config, finetune)
    found = training_flops(model, config, finetune)
    assert found == counted_flops(on_meta(config, finetune)) - recomputed(model)
    return model, found


def test_backward_pass_counts_the_gradients_that_what_is_trained_needs():
    model, found = cost(freeze=["embedding", "start", "stack.blocks.0"])
    forward, of_head = model.flops(32), recomputed(model)
    of_block = (forward - of_head) // 3
    assert found == 3 * forward - 2 * of_block - of_head  # no backward pass of block 0, no gradient of the tied head
    model, found = cost(freeze=["stack.blocks.1"])
    assert found == 3 * forward - weights(model, "stack.blocks.1")  # the gradient passes through it
    last = "stack.blocks.2.feed_forward.contract"
    model, found = cost(freeze=["*"], train=[last])
    assert found == forward + of_head + weights(model, last)  # the head passes the gradient on
    model, found = cost(freeze=["*"], adapters={"layers": [last], "rank": 2})
    adapter, up = weights(model, f"{last}.adapter"), weights(model, f"{last}.adapter_up")
    assert found == model.flops(32) + of_head + adapter + up  # A needs the gradient of what B reads
