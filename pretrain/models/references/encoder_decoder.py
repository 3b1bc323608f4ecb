"""Forward pass of a Byteloom encoder with a decoder in plain torch, for the weights in this folder.

`python model.py FILE` prints the likeliest ids after each id of the target, for a file as the source.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.references.encoding import added, embed, place, seen, self_attention, stack
from pretrain.models.references.layers import (
    SEPARATOR,
    Weights,
    attend,
    feed_forward,
    linear,
    load,
    norm,
    split_heads,
)


class Model:
    """Transformer encoder with a decoder."""

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        """Take the model's config and its weights by name."""
        self.config, self.w = config, weights

    def logits(self, ids: Tensor, given: Tensor) -> Tensor:
        """Map (rows, n) targets and (rows, m) sources to the logits of each id of the target: (rows, n, symbols)."""
        c, w, table = self.config, self.w, self.w["read.table.weight"]
        layers = c["layers"] if c["encoder_layers"] is None else c["encoder_layers"]
        states = stack(w, "encoder", place(w, "read", embed(w, given, c), c), c, layers, seen(given))
        x = torch.cat([w["start"].expand(len(ids), 1, -1), embed(w, ids[:, :-1], c)], 1)
        x = place(w, "written", x, c)
        past = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()

        for layer in range(c["layers"]):
            block = f"decoder_blocks.{layer}"
            attention = partial(self_attention, w, f"{block}.attention", visible=past, c=c)
            x = added(w, f"{block}.attention_norm", x, attention, c)
            to_source = partial(self.attend_to, f"{block}.cross_attention", states, seen(given))
            x = added(w, f"{block}.cross_attention_norm", x, to_source, c)
            expanded = partial(feed_forward, w, f"{block}.feed_forward", activation=c["activation"])
            x = added(w, f"{block}.feed_forward_norm", x, expanded, c)
        x = x if c["norm"] == "post" else norm(w, "norm", x)
        return F.linear(x, table, w["head_bias"] if c["biases"] else None)

    def attend_to(self, name: str, states: Tensor, visible: Tensor, x: Tensor) -> Tensor:
        """Apply the attention layer of this name from (rows, n, width) to the states of the encoder."""
        heads = self.config["heads"]
        q = split_heads(linear(self.w, f"{name}.query", x), heads)
        k, v = (split_heads(part, heads) for part in linear(self.w, f"{name}.key_value", states).chunk(2, -1))
        return linear(self.w, f"{name}.output", attend(q, k, v, visible))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} FILE")
    model = Model(*load(Path(__file__).parent))
    source = torch.tensor([list(Path(sys.argv[1]).read_bytes()[: model.config["source_length"]])])
    target: list[int] = []
    with torch.no_grad():
        while len(target) < model.config["target_length"] and SEPARATOR not in target:
            target.append(int(model.logits(torch.tensor([[*target, 0]]), source)[0, -1].argmax()))
    print(target)
