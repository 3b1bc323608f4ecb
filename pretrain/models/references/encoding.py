"""Encoder that model.py uses: ids with positions, and blocks in which positions see each other."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.references.layers import (
    PADDING,
    Weights,
    attend,
    feed_forward,
    first_bytes,
    linear,
    norm,
    rotate,
    sinusoids,
    split_heads,
)

MASK = 258
Layer = Callable[[Tensor], Tensor]


def embed(w: Weights, ids: Tensor, c: dict[str, Any]) -> Tensor:
    """Map (rows, n) ids to their embeddings, scaled if the config says so."""
    return w["read.table.weight"][ids] * (c["width"] ** 0.5 if c["scale_embeddings"] else 1.0)


def place(w: Weights, name: str, x: Tensor, c: dict[str, Any]) -> Tensor:
    """Add positions, if these are added, to (rows, n, width) embeddings."""
    if c["positions"] == "learned":
        return x + w[f"{name}.learned"][: x.shape[1]]
    return x + sinusoids(torch.arange(x.shape[1]), c["width"]).to(x) if c["positions"] == "sinusoidal" else x


def seen(ids: Tensor) -> Tensor:
    """Return the mask of ids that are no padding, (rows, 1, 1, n); a row of padding alone sees itself."""
    is_id = ids != PADDING
    return (is_id | ~is_id.any(1, keepdim=True))[:, None, None]


def added(w: Weights, name: str, x: Tensor, layer: Layer, c: dict[str, Any]) -> Tensor:
    """Add a layer's output to its input, with a norm of this name before the layer or after the sum."""
    return norm(w, name, x + layer(x)) if c["norm"] == "post" else x + layer(norm(w, name, x))


def self_attention(w: Weights, name: str, x: Tensor, visible: Tensor, c: dict[str, Any]) -> Tensor:
    """Apply a layer of attention to the visible positions."""
    q, k, v = (split_heads(part, c["heads"]) for part in linear(w, f"{name}.query_key_value", x).chunk(3, -1))
    if c["positions"] == "rotary":
        q, k = (rotate(part, torch.arange(x.shape[-2])) for part in (q, k))
    return linear(w, f"{name}.output", attend(q, k, v, visible))


def stack(w: Weights, name: str, x: Tensor, c: dict[str, Any], layers: int, visible: Tensor) -> Tensor:
    """Apply the blocks of an encoder, and the last norm of a pre-norm stack."""
    for layer in range(layers):
        block = f"{name}.blocks.{layer}"
        attention = partial(self_attention, w, f"{block}.attention", visible=visible, c=c)
        x = added(w, f"{block}.attention_norm", x, attention, c)
        expanded = partial(feed_forward, w, f"{block}.feed_forward", activation=c["activation"])
        x = added(w, f"{block}.feed_forward_norm", x, expanded, c)
    return x if c["norm"] == "post" else norm(w, f"{name}.norm", x)


def measure_masked(logits: Callable[[Tensor, Tensor], Tensor], length: int) -> None:
    """Print the bits of the byte in the middle of the first `length` bytes of the file that the command names."""
    ids = first_bytes(length)
    middle, given = ids.shape[1] // 2, ids.clone()
    given[0, middle] = MASK
    with torch.no_grad():
        nats = F.cross_entropy(logits(ids, given)[0, middle], ids[0, middle])
    print(f"{nats / math.log(2):.4f} bits of byte {middle}")
