"""Forward pass of a Byteloom Transformer in plain torch, for the weights in this folder.

`python model.py FILE` prints the bits per byte of the beginning of a file.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.references.layers import Weights, documents_of, load, measure, stack


class Model:
    """Decoder-only Transformer."""

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        """Take the model's config and its weights by name."""
        self.config, self.w = config, weights

    def logits(self, ids: Tensor) -> Tensor:
        """Map (rows, T) ids to (rows, T, 258) logits of each id, given the ids before it."""
        c, w, table = self.config, self.w, self.w["embedding.weight"]
        x = torch.cat([w["start"].expand(len(ids), 1, -1), table[ids[:, :-1]]], 1)
        if c["positions"] == "learned":
            x = x + w["positions"][: ids.shape[1]]
        x = stack(w, "stack", x, c, c["activation"], self.visible(ids), c["positions"] == "rotary")
        return F.linear(x, table, w["head_bias"] if c["biases"] else None)

    def visible(self, ids: Tensor) -> Tensor:
        """Return the mask, (rows or 1, 1, T, T): true where a position sees another."""
        length = ids.shape[1]
        age = torch.arange(length)[:, None] - torch.arange(length)
        seen = (age >= 0) & (age < (self.config["window"] or length))
        if self.config["attention_across_documents"]:
            return seen[None, None]
        documents = documents_of(ids)
        return (seen & (documents[:, :, None] == documents[:, None]))[:, None]


if __name__ == "__main__":
    model = Model(*load(Path(__file__).parent))
    measure(model.logits, model.config["sequence_length"])
