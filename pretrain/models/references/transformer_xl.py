"""Forward pass of a Byteloom Transformer-XL in plain torch, for the weights in this folder."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.references.layers import (
    Weights,
    attend,
    block,
    documents_of,
    feed_forward,
    linear,
    load,
    measure,
    norm,
    rotate,
    sinusoids,
    split_heads,
)

Memory = tuple[Tensor, list[Tensor]]
"""The (rows, m) ids of the last positions, and the (rows, m, D) input of each layer there."""


class Model:
    """Transformer over segments, with the last M positions of earlier segments as memory."""

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        """Take the model's config and its weights by name."""
        self.config, self.w = config, weights

    def logits(self, ids: Tensor) -> Tensor:
        """Map the (rows, T) ids of a first segment to (rows, T, 258) logits of each id, given the ids before it."""
        return self.segment(ids, self.empty_memory(len(ids)))[0]

    def empty_memory(self, rows: int) -> Memory:
        """Return the memory of rows that begin."""
        return torch.empty(rows, 0, dtype=torch.long), [self.w["start"].expand(rows, 0, -1)] * self.config["layers"]

    def segment(self, ids: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Return the (rows, T, 258) logits of the ids of a segment, and the memory for the next one."""
        c, w, length = self.config, self.w, ids.shape[1]
        every = torch.cat([memory[0], ids], 1)
        keys, table = every.shape[1], w["embedding.weight"]
        first = table[every[:, -length - 1, None]] if keys > length else w["start"].expand(len(ids), 1, -1)
        x = torch.cat([first, table[ids[:, :-1]]], 1) * (c["width"] ** 0.5 if c["scale_embeddings"] else 1)
        documents, places = documents_of(every), torch.arange(keys)
        age = places[-length:, None] - places
        visible = (age >= 0) & (age < (c["memory_length"] if c["same_length"] else keys))
        visible = (visible & (documents[:, -length:, None] == documents[:, None]))[:, None]
        distances = sinusoids(places.clamp(0, c["clamp_length"]), c["width"]).to(x.dtype)
        states = []
        for layer in range(c["layers"]):
            name, before = f"blocks.{layer}", memory[1][layer]
            states.append(torch.cat([before, x], 1)[:, keys - min(keys, c["memory_length"]) :])
            if c["norm"] == "pre":
                before = norm(w, f"{name}.attention_norm", before)

            def attention(name: str, x: Tensor, before: Tensor = before) -> Tensor:
                parts = linear(w, f"{name}.query_key_value", torch.cat([before, x], 1)).chunk(3, -1)
                q, k, v = (split_heads(part, c["heads"]) for part in parts)
                q = q[:, :, -length:]
                if c["positions"] == "rotary":
                    q, k = rotate(q, places[-length:]), rotate(k, places)
                    return linear(w, f"{name}.output", attend(q, k, v, visible))
                of_distances = split_heads(linear(w, f"{name}.distance_key", distances), c["heads"])
                by_distance = (q + w["position_bias"][:, None]) @ of_distances.transpose(1, 2)
                bias = by_distance.gather(-1, age.clamp(min=0).expand_as(by_distance))
                return linear(w, f"{name}.output", attend(q + w["content_bias"][:, None], k, v, visible, bias))

            if c["norm"] == "pre":
                x = block(w, name, x, attention, c["activation"])
            else:
                x = norm(w, f"{name}.attention_norm", x + attention(f"{name}.attention", x))
                fed = feed_forward(w, f"{name}.feed_forward", x, c["activation"])
                x = norm(w, f"{name}.feed_forward_norm", x + fed)
        x = norm(w, "norm", x) if c["norm"] == "pre" and c["final_norm"] else x
        return F.linear(x, table, w.get("head_bias")), (every[:, keys - min(keys, c["memory_length"]) :], states)


if __name__ == "__main__":  # python model.py FILE prints the bits per byte of the first segment of a file
    model = Model(*load(Path(__file__).parent))
    measure(model.logits, model.config["sequence_length"])
