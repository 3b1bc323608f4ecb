"""Forward pass of a Byteloom BLT in plain torch, row by row and patch by patch, for the weights in this folder.

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
    feed_forward,
    linear,
    load,
    measure,
    rotate,
    split_heads,
)
from pretrain.models.references.patches import starts_of

PRIMES = [1000000007, 5915587277, 1500450271, 3267000013, 5754853343, 4093082899, 9576890767, 3628273133]
PRIMES += [2860486313, 5463458053, 3367900313]


def rms_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    """Apply root mean square normalization over the last dimension."""
    return F.rms_norm(x, x.shape[-1:], w[f"{name}.weight"], eps=1e-5)


class Model:
    """Transformer over patches, with attention between positions and patches."""

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        """Take the model's config and its weights by name."""
        self.config, self.w = config, weights
        self.heads = config["local_model"]["heads"]

    def logits(self, ids: Tensor) -> Tensor:
        """Map (rows, T) ids to (rows, T, 258) logits of each id, given the ids before it."""
        return torch.stack([self.of_row([SEPARATOR, *row[:-1].tolist()]) for row in ids])

    def of_row(self, read: list[int]) -> Tensor:
        """Map the T ids that positions read to (T, 258) logits."""
        c, w, length = self.config, self.w, len(read)
        documents = torch.tensor([id == SEPARATOR for id in read]).cumsum(0)
        if c["attention_across_documents"]:
            documents = torch.ones_like(documents)
        x = w["embedding.weight"][read]
        if c["ngrams"] is not None:
            x = self.with_ngrams(x, read, documents.tolist())
        states = []
        for layer in range(c["local_model"]["encoder_layers"]):
            x = self.block(f"encoder_blocks.{layer}", x, self.heads, documents, c["window"])
            states.append(x)
        across = c["attention_across_documents"]
        places = starts_of(c["patcher"], c["patches"], read, across_documents=across)
        patches, begin = [], 0
        for place in places:
            inside = range(begin, place + 1)
            patches.append(self.patch([s[[i for i in inside if documents[i] == documents[place]]] for s in states]))
            begin = place + 1
        y = torch.stack(patches)
        for layer in range(c["global_model"]["layers"]):
            y = self.block(f"global_blocks.{layer}", y, c["global_model"]["heads"], documents[places], None)
        y = linear(w, "patch_output", y).unflatten(1, (-1, x.shape[1]))  # (K, k, d)
        newest = torch.tensor([sum(place <= i for place in places) - 1 for i in range(length)])
        if c["decoder_attention"] == "none":
            x = x + y[newest, 0]
        for layer in range(c["local_model"]["decoder_layers"]):
            name = f"decoder_blocks.{layer}"
            if f"{name}.reading.query.weight" in w:
                x = self.exchange(f"{name}.reading", x[:, None], y[newest])[:, 0]
            x = self.block(name, x, self.heads, documents, c["window"])
        return rms_norm(w, "norm", x) @ w["head"].T

    def with_ngrams(self, x: Tensor, read: list[int], documents: list[int]) -> Tensor:
        """Add the vectors of the n-grams that end at each position."""
        n = self.config["ngrams"]
        symbols, table = [id + 4 if id < SEPARATOR else id - SEPARATOR + 1 for id in read], 0
        for prime in PRIMES[: n["functions"]]:
            for size in n["sizes"]:
                buckets = []
                for i in range(len(read)):
                    window = range(i - size + 1, i + 1)
                    tokens = [symbols[j] if j >= 0 and documents[j] == documents[i] else 0 for j in window]
                    value = sum(token * prime**power for power, token in enumerate(tokens)) % 2**64
                    buckets.append((value - 2**64 * (value >= 2**63)) % n["buckets"])
                x = x + self.w[f"ngrams.tables.{table}.weight"][buckets]
                table += 1
        return x / (1 + table) if n["normalize"] else x

    def patch(self, states: list[Tensor]) -> Tensor:
        """Map the outputs of encoder blocks at the positions of a patch, (n, d) each, to the vector of the patch."""
        c, w = self.config, self.w
        read = states if c["encoder_attention"] == "all" else states[-1:]
        if c["pooling"] != "none":
            pooled = {"max": read[0].amax(0), "min": read[0].amin(0), "mean": read[0].mean(0)}[c["pooling"]]
        if c["encoder_attention"] != "none":
            shared = c["pooling"] == "none"
            slots = w["shared_slots"] if shared else linear(w, "first_slots", pooled).unflatten(0, (c["slots"], -1))
            for layer, x in enumerate(read):
                slots = self.exchange(f"slot_blocks.{layer}.attention", slots, x)
            pooled = slots.flatten()
        return linear(w, "patch_input", pooled) if "patch_input.weight" in w else pooled

    def exchange(self, name: str, x: Tensor, inputs: Tensor) -> Tensor:
        """Let (..., n, d) vectors attend to all of (..., m, d) inputs."""
        q = linear(self.w, f"{name}.query", rms_norm(self.w, f"{name}.query_norm", x))
        k, v = linear(self.w, f"{name}.key_value", rms_norm(self.w, f"{name}.input_norm", inputs)).chunk(2, -1)
        q, k, v = (split_heads(part, self.heads) for part in (q, k, v))
        mixed = attend(q, k, v, torch.tensor(True))
        return self.config["cross_residual"] * x + linear(self.w, f"{name}.output", mixed)

    def block(self, name: str, x: Tensor, heads: int, documents: Tensor, window: int | None) -> Tensor:
        """Apply a Transformer block to (n, width)."""
        w, places = self.w, torch.arange(len(x))
        age = places[:, None] - places
        visible = (age >= 0) & (age < (window or len(x))) & (documents[:, None] == documents)
        normed = rms_norm(w, f"{name}.attention_norm", x)
        q, k, v = (
            split_heads(part, heads) for part in linear(w, f"{name}.attention.query_key_value", normed).chunk(3, -1)
        )
        half = q.shape[-1] // 2
        longest = self.config["rotary_base"] ** ((half - 1) / max(half, 1))
        q, k = (rotate(part, places, longest=longest) for part in (q, k))
        x = x + linear(w, f"{name}.attention.output", attend(q, k, v, visible))
        normed = rms_norm(w, f"{name}.feed_forward_norm", x)
        return x + feed_forward(w, f"{name}.feed_forward", normed, self.config["activation"])


if __name__ == "__main__":
    model = Model(*load(Path(__file__).parent))
    measure(model.logits, model.config["sequence_length"])
