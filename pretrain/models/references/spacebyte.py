"""Forward pass of a Byteloom SpaceByte in plain torch, row by row, for the weights in this folder.

`python model.py FILE` prints the bits per byte of the beginning of a file.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.references.layers import (
    SEPARATOR,
    Weights,
    attend,
    block,
    linear,
    load,
    measure,
    norm,
    rotate,
    split_heads,
)
from pretrain.models.references.patches import starts_of


class Model:
    """Transformer whose global blocks run where patches start."""

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        """Take the model's config and its weights by name."""
        self.config, self.w = config, weights

    def logits(self, ids: Tensor) -> Tensor:
        """Map (rows, T) ids to (rows, T, 258) logits of each id, given the ids before it."""
        return torch.stack([self.of_row(row) for row in ids])

    def of_row(self, ids: Tensor) -> Tensor:
        """Map (T,) ids to (T, 258) logits."""
        c, w, length = self.config, self.w, len(ids)
        x = torch.cat([w["start"][None], w["embedding.weight"][ids[:-1]]])
        if c["positions"] != "rotary":
            x = x + w["positions"][:length]
        x = self.blocks("first_blocks", x, c["local_model"], c["window"])
        places = starts_of(c["patcher"], c["patches"], [SEPARATOR, *ids[:-1].tolist()])
        patches = F.pad(x[places], (c["global_model"]["width"] - x.shape[1], 0))
        if c["positions"] != "rotary":
            patches = patches + w["patch_positions"][: len(places)]
        added = self.blocks("global_blocks", patches, c["global_model"], None)[:, -x.shape[1] :]
        x = x.index_add(0, torch.tensor(places), added)
        x = self.blocks("last_blocks", x, c["local_model"], c["window"])
        return norm(w, "norm", x) @ w["head"].T

    def blocks(self, name: str, x: Tensor, size: dict[str, Any], window: int | None) -> Tensor:
        """Apply a list of blocks to (n, width)."""
        c, w, places = self.config, self.w, torch.arange(len(x))
        age = places[:, None] - places
        visible = (age >= 0) & (age < (window or len(x)))

        def attention(name: str, x: Tensor) -> Tensor:
            q, k, v = (
                split_heads(part, size["heads"]) for part in linear(w, f"{name}.query_key_value", x).chunk(3, -1)
            )
            if c["query_key_norm"]:
                q, k = norm(w, f"{name}.query_norm", q), norm(w, f"{name}.key_norm", k)
            if c["positions"] != "learned":
                q, k = rotate(q, places), rotate(k, places)
            return linear(w, f"{name}.output", attend(q, k, v, visible))

        for layer in range(sum(key.startswith(f"{name}.") and key.endswith("expand.weight") for key in w)):
            x = block(w, f"{name}.{layer}", x, attention, c["activation"])
        return x


if __name__ == "__main__":
    model = Model(*load(Path(__file__).parent))
    measure(model.logits, model.config["sequence_length"])
