"""Forward pass of a Byteloom H-Net in plain torch, row by row, for the weights in this folder.

`python model.py FILE` prints the bits per byte of the beginning of a file.
"""

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.references.layers import (
    PADDING,
    SEPARATOR,
    Weights,
    attend,
    feed_forward,
    linear,
    load,
    measure,
    rotate,
    split_heads,
)
from pretrain.models.references.mamba2 import mamba2, rms_norm
from pretrain.models.references.patches import starts_of


class Model:
    """Nested stages around a main stack."""

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        """Take the model's config and its weights by name."""
        self.config, self.w = config, weights

    def logits(self, ids: Tensor) -> Tensor:
        """Map (rows, T) ids to (rows, T, 258) logits of each id, given the ids before it."""
        return torch.stack([self.of_row(row) for row in ids])

    def of_row(self, ids: Tensor) -> Tensor:
        """Map (T,) ids to (T, 258) logits."""
        x = torch.cat([self.w["start"][None], self.w["embedding.weight"][ids[:-1]]])
        return self.run(0, x, [SEPARATOR, *ids[:-1].tolist()]) @ self.w["head"].T

    def run(self, level: int, x: Tensor, read: list[int]) -> Tensor:
        """Apply a stage, or the main stack after the last one, to (n, width) positions that read ids."""
        c, w = self.config, self.w
        if level == len(c["stages"]):
            return self.stack("main", x, c["main"], c["main"]["layers"], None)
        stage, name = c["stages"][level], f"stages.{level}"
        is_padded = stage["join"] == "padded"
        encode = self.stack if is_padded else self.blocks
        states = encode(f"{name}.encoder", x, stage, stage["encoder"], stage["window"])
        if stage["patcher"]["name"] == "learned":
            p = self.probabilities(f"{name}.patcher", states, torch.tensor(read))
            starts = [i for i, byte in enumerate(read) if p[i] > 0.5 and byte != PADDING][: stage["patches"]]
        else:
            starts = starts_of(stage["patcher"], stage["patches"], read)
        inner = states[starts]
        if stage.get("downsampling", "select") != "select":
            parts = [states[first + 1 : last + 1] for first, last in zip([-1, *starts[:-1]], starts, strict=True)]
            inner = torch.stack([part.amax(0) if stage["downsampling"] == "max" else part.mean(0) for part in parts])
        if not is_padded:
            inner = linear(w, f"{name}.down", rms_norm(w, f"{name}.encoder.norm", inner))
        if f"{name}.pad" in w:
            inner = torch.cat([inner, w[f"{name}.pad"].expand(len(starts), -1)], 1)
        inner = self.run(level + 1, inner, [read[i] for i in starts])
        inner = inner[:, : stage["width"]] if is_padded else inner
        if stage["patcher"].get("smoothing"):
            average = torch.zeros_like(inner[0])
            for patch, start in enumerate(starts):
                weight = p[start].clamp(1e-4, 1 - 1e-4)
                average = weight * inner[patch] + (1 - weight) * average
                inner = torch.cat([inner[:patch], average[None], inner[patch + 1 :]])
        newest = [sum(start <= i for start in starts) - 1 for i in range(len(read))]
        served = inner[newest]
        if not is_padded:
            maps = linear(w, f"{name}.up.by_place", inner).unflatten(1, (stage["places"], -1))
            places = [(i - starts[patch]) % stage["places"] for i, patch in enumerate(newest)]
            served = maps[newest, places] + linear(w, f"{name}.up.shared", inner)[newest]
        if not stage["patcher"].get("straight_through", True):
            served = torch.stack([p[i] if i in starts else 1 - p[i] for i in range(len(read))])[:, None] * served
        joined = served + (linear(w, f"{name}.residual", states) if is_padded else states)
        return self.stack(f"{name}.decoder", joined, stage, stage["decoder"], stage["window"])

    def probabilities(self, name: str, states: Tensor, read: Tensor) -> Tensor:
        """Return the probability that a patch starts at each position."""
        if f"{name}.score.weight" in self.w:
            p = linear(self.w, f"{name}.score", states)[:, 0].sigmoid()
            return p.masked_fill(read == SEPARATOR, 1)
        queries, keys = linear(self.w, f"{name}.query", states), linear(self.w, f"{name}.key", states)
        p = (1 - F.cosine_similarity(queries[:-1], keys[1:], -1)) / 2
        return F.pad(p.clamp(0, 1), (1, 0)).masked_fill(read == SEPARATOR, 1)

    def stack(self, name: str, x: Tensor, sizes: dict[str, Any], layout: str, window: int | None) -> Tensor:
        """Apply the blocks of a layout to (n, width), and the norm after them."""
        return rms_norm(self.w, f"{name}.norm", self.blocks(name, x, sizes, layout, window))

    def blocks(self, name: str, x: Tensor, sizes: dict[str, Any], layout: str, window: int | None) -> Tensor:
        """Apply the blocks of a layout to (n, width)."""
        w, places = self.w, torch.arange(len(x))
        age = places[:, None] - places
        visible = (age >= 0) & (age < (window or len(x)))
        kinds = "".join(kind * int(number) for kind, number in re.findall(r"([a-zA-Z])([0-9]+)", layout))
        for layer, kind in enumerate(kinds):
            block = f"{name}.blocks.{layer}"
            mixer, normed = f"{block}.mixer", rms_norm(w, f"{block}.norm", x)
            if kind in "mM":
                one_document = torch.zeros_like(places)[None]
                x = x + mamba2(w, mixer, normed[None], one_document, self.config["mamba"])[0]
            else:
                fused = linear(w, f"{mixer}.query_key_value", normed).chunk(3, -1)
                q, k, v = (split_heads(part, sizes["heads"]) for part in fused)
                half = int(q.shape[-1] * self.config["rotary"]["fraction"]) // 2
                longest = self.config["rotary"]["base"] ** ((half - 1) / max(half, 1))
                q, k = (rotate(part, places, half, longest) for part in (q, k))
                x = x + linear(w, f"{mixer}.output", attend(q, k, v, visible))
            if kind in "MT":
                x = x + feed_forward(w, f"{block}.feed_forward", rms_norm(w, f"{block}.feed_forward_norm", x), "swiglu")
        return x


if __name__ == "__main__":
    model = Model(*load(Path(__file__).parent))
    measure(model.logits, model.config["sequence_length"])
