"""Forward pass of a Byteloom encoder in plain torch, for the weights in this folder.

`python model.py FILE` prints the bits of the byte in the middle of the beginning of a file, which is masked.
"""

import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.references.layers import (
    PADDING,
    Weights,
    attend,
    feed_forward,
    linear,
    load,
    norm,
    rotate,
    sinusoids,
    split_heads,
)

MASK = 258


class Model:
    """Bidirectional Transformer encoder."""

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        """Take the model's config and its weights by name."""
        self.config, self.w = config, weights

    def logits(self, ids: Tensor, given: Tensor) -> Tensor:
        """Map (rows, T) ids that are read to (rows, T, 258) logits of the ids behind them; `ids` are not read."""
        table = self.w["read.table.weight"]
        states = stack(self.w, "stack", read(self.w, "read", given, self.config), self.config, seen(given))
        return F.linear(states, table[:258], self.w["head_bias"] if self.config["biases"] else None)


def read(w: Weights, name: str, ids: Tensor, c: dict[str, Any]) -> Tensor:
    """Map (rows, n) ids to their embeddings, with positions if these are added."""
    x = w[f"{name}.table.weight"][ids] * (c["width"] ** 0.5 if c["scale_embeddings"] else 1.0)
    if c["positions"] == "learned":
        return x + w[f"{name}.learned"][: ids.shape[1]]
    return x + sinusoids(torch.arange(ids.shape[1]), c["width"]).to(x) if c["positions"] == "sinusoidal" else x


def seen(ids: Tensor) -> Tensor:
    """Return the mask of ids that are no padding, (rows, 1, 1, n); a row of padding alone sees itself."""
    is_id = ids != PADDING
    return (is_id | ~is_id.any(1, keepdim=True))[:, None, None]


def stack(w: Weights, name: str, x: Tensor, c: dict[str, Any], visible: Tensor) -> Tensor:
    """Apply the blocks in which positions see the visible ones, and the last norm of a pre-norm stack."""
    is_post = c["norm"] == "post"
    for layer in range(c["layers"]):
        block = f"{name}.blocks.{layer}"
        q, k, v = (
            split_heads(part, c["heads"])
            for part in linear(
                w, f"{block}.attention.query_key_value", x if is_post else norm(w, f"{block}.attention_norm", x)
            ).chunk(3, -1)
        )
        if c["positions"] == "rotary":
            q, k = (rotate(part, torch.arange(x.shape[-2])) for part in (q, k))
        x = x + linear(w, f"{block}.attention.output", attend(q, k, v, visible))
        if is_post:
            x = norm(w, f"{block}.attention_norm", x)
            x = norm(w, f"{block}.feed_forward_norm", x + feed_forward(w, f"{block}.feed_forward", x, c["activation"]))
        else:
            normed = norm(w, f"{block}.feed_forward_norm", x)
            x = x + feed_forward(w, f"{block}.feed_forward", normed, c["activation"])
    return x if is_post else norm(w, f"{name}.norm", x)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} FILE")
    model = Model(*load(Path(__file__).parent))
    ids = torch.tensor([list(Path(sys.argv[1]).read_bytes()[: model.config["sequence_length"]])])
    middle, given = ids.shape[1] // 2, ids.clone()
    given[0, middle] = MASK
    with torch.no_grad():
        nats = F.cross_entropy(model.logits(ids, given)[0, middle], ids[0, middle])
    print(f"{nats / math.log(2):.4f} bits of byte {middle}")
