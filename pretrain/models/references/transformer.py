"""Forward pass of a Byteloom Transformer in plain torch, for the weights in this folder."""

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
        if c["positions"] == "grid":
            places, stride = torch.arange(ids.shape[1]), c["attention_stride"]
            x = x + w["block_positions"][places // stride] + w["column_positions"][places % stride]
        x = stack(w, "stack", x, c, c["activation"], self.visible(ids), c["positions"] == "rotary")
        return F.linear(x, table, w["head_bias"] if c["biases"] else None)

    def visible(self, ids: Tensor) -> list[Tensor]:
        """Return the masks of layers in turn, (rows or 1, heads or 1, T, T): true where a position sees another."""
        length = ids.shape[1]
        age = torch.arange(length)[:, None] - torch.arange(length)
        seen = (age >= 0) & (age < (self.config["window"] or length))
        masks = [seen[None, None] & pattern for pattern in self.patterns(age)]
        if self.config["attention_across_documents"]:
            return masks
        documents = documents_of(ids)
        return [mask & (documents[:, :, None] == documents[:, None])[:, None] for mask in masks]

    def patterns(self, age: Tensor) -> list[Tensor]:
        """Return the patterns of sparse attention that layers have in turn, (heads or 1, T, T)."""
        c, places = self.config, torch.arange(len(age))
        if c["attention"] == "full":
            return [torch.ones_like(age, dtype=torch.bool)[None]]
        stride = c["attention_stride"]
        if c["attention"] == "strided":
            near, far = (age < stride)[None], (age % stride == 0)[None]
        else:
            near = (places[:, None] // stride == places // stride)[None]
            group = torch.arange(c["heads"])[:, None] % c["attention_groups"]
            before_end = (stride - 1 - places % stride) // c["attention_summary"]
            far = (before_end == group)[:, None] | (age == 0)
        return [near | far] if c["attention_layers"] == "merged" else [near, far]


if __name__ == "__main__":  # python model.py FILE prints the bits per byte of the beginning of a file
    model = Model(*load(Path(__file__).parent))
    measure(model.logits, model.config["sequence_length"])
