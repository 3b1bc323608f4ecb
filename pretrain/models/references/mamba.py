"""Forward pass of a Byteloom Mamba-2 in plain torch, position by position, for the weights in this folder.

`python model.py FILE` prints the bits per byte of the beginning of a file.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.references.layers import Weights, documents_of, linear, load, measure


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    """Divide by the root mean square over the last dimension, and multiply by a weight."""
    return F.rms_norm(x, x.shape[-1:], w[f"{name}.weight"], eps=1e-5)


class Model:
    """Mamba-2 over bytes."""

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        """Take the model's config and its weights by name."""
        self.config, self.w = config, weights

    def logits(self, ids: Tensor) -> Tensor:
        """Map (rows, T) ids to (rows, T, 258) logits of each id, given the ids before it."""
        w, table = self.w, self.w["embedding.weight"]
        x = torch.cat([w["start"].expand(len(ids), 1, -1), table[ids[:, :-1]]], 1)
        documents = documents_of(ids)
        if self.config["attention_across_documents"]:
            documents = torch.zeros_like(documents)
        for layer in range(self.config["layers"]):
            name = f"blocks.{layer}"
            x = x + self.mixer(f"{name}.mixer", norm(w, f"{name}.norm", x), documents)
        return F.linear(norm(w, "norm", x), table)

    def empty_memory(self, rows: int) -> Tensor:
        """Return the ids before rows that begin: none."""
        return torch.empty(rows, 0, dtype=torch.long)

    def segment(self, ids: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (rows, T, 258) logits of ids that follow those of the memory, and both together."""
        every = torch.cat([memory, ids], 1)
        return self.logits(every)[:, memory.shape[1] :], every

    def mixer(self, name: str, x: Tensor, documents: Tensor) -> Tensor:
        """Apply a Mamba-2 layer to (rows, T, width)."""
        w, size = self.w, self.config["state"]
        gate, values = linear(w, f"{name}.expand", x).chunk(2, -1)
        mixed = F.silu(self.convolution(name, torch.cat([values, linear(w, f"{name}.select", x)], -1), documents))
        values, write, read = mixed.split([values.shape[-1], size, size], -1)
        heads = values.unflatten(-1, (-1, self.config["head_width"]))
        steps = F.softplus(linear(w, f"{name}.step", x) + w[f"{name}.step_bias"])
        decays = (-steps * w[f"{name}.log_rate"].exp()).exp()
        state, outputs = torch.zeros(*heads[:, 0].shape, size, dtype=x.dtype), []
        for t in range(x.shape[1]):
            goes_on = (documents[:, t] == documents[:, max(t - 1, 0)])[:, None, None, None]
            added = (steps[:, t, :, None] * heads[:, t])[..., None] * write[:, t, None, None]
            state = state * goes_on * decays[:, t, :, None, None] + added
            outputs.append((state * read[:, t, None, None]).sum(-1) + w[f"{name}.skip"][:, None] * heads[:, t])
        y = torch.stack(outputs, 1).flatten(-2)
        return linear(w, f"{name}.contract", norm(w, f"{name}.norm", y * F.silu(gate)))

    def convolution(self, name: str, x: Tensor, documents: Tensor) -> Tensor:
        """Apply each channel's causal convolution to (rows, T, channels), within documents."""
        weight, length = self.w[f"{name}.convolution.weight"][:, 0], x.shape[1]
        total = self.w[f"{name}.convolution.bias"].expand_as(x)
        for age in range(weight.shape[1]):
            earlier = F.pad(x, (0, 0, age, 0))[:, :length]
            same = F.pad(documents, (age, 0), value=-1)[:, :length] == documents
            total = total + earlier * same[..., None] * weight[:, -1 - age]
        return total


if __name__ == "__main__":
    model = Model(*load(Path(__file__).parent))
    measure(model.logits, model.config["sequence_length"])
