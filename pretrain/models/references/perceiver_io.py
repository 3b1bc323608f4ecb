"""Forward pass of a Byteloom Perceiver IO in plain torch, for the weights in this folder.

`python model.py FILE` prints the bits of the byte in the middle of the beginning of a file, which is masked.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.references.encoding import measure_masked, seen
from pretrain.models.references.layers import Weights, attend, feed_forward, linear, load, norm, split_heads


class Model:
    """Latents that read a row, blocks over the latents, and queries that read the latents."""

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        """Take the model's config and its weights by name."""
        self.config, self.w = config, weights

    def logits(self, ids: Tensor, given: Tensor) -> Tensor:
        """Map (rows, T) ids that are read to (rows, T, 258) logits of the ids behind them; `ids` are not read."""
        c, w = self.config, self.w
        inputs = w["read.table.weight"][given] + w["read.learned"][: given.shape[1]]
        z = w["latents"].expand(len(given), -1, -1)
        for repeat in range(c["repeats"]):
            if repeat == 0 or c["cross_attend_every_repeat"]:
                name = f"input_blocks.{min(repeat, 1)}"
                source = norm(w, f"{name}.input_norm", inputs)
                z = self.expand(name, z + self.attended(name, z, source, c["cross_heads"], seen(given)))
            for layer in range(c["latent_model"]["layers"]):
                name = f"latent_blocks.{layer}"
                source, heads = norm(w, f"{name}.attention_norm", z), c["latent_model"]["heads"]
                z = self.expand(name, z + self.attended(name, z, source, heads, torch.tensor(True)))
        queries = w["queries"][: given.shape[1]].expand(len(given), -1, -1)
        source = norm(w, "output_block.input_norm", z)
        found = self.attended("output_block", queries, source, c["cross_heads"], torch.tensor(True))
        states = self.expand("output_block", found)  # the queries themselves are not added
        return F.linear(states, w["read.table.weight"][:258], w["head_bias"])

    def attended(self, name: str, x: Tensor, source: Tensor, heads: int, visible: Tensor) -> Tensor:
        """Return what the positions of (rows, n, width) x read in the source."""
        q = split_heads(linear(self.w, f"{name}.attention.query", norm(self.w, f"{name}.attention_norm", x)), heads)
        k, v = (split_heads(linear(self.w, f"{name}.attention.{part}", source), heads) for part in ("key", "value"))
        return linear(self.w, f"{name}.attention.output", attend(q, k, v, visible))

    def expand(self, name: str, x: Tensor) -> Tensor:
        """Add the feed-forward layer of a block."""
        normed = norm(self.w, f"{name}.feed_forward_norm", x)
        return x + feed_forward(self.w, f"{name}.feed_forward", normed, self.config["activation"])


if __name__ == "__main__":
    model = Model(*load(Path(__file__).parent))
    measure_masked(model.logits, model.config["sequence_length"])
