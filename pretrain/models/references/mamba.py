"""Forward pass of a Byteloom Mamba-2 in plain torch, position by position, for the weights in this folder.

`python model.py FILE` prints the bits per byte of the beginning of a file.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.references.layers import Weights, documents_of, load, measure
from pretrain.models.references.mamba2 import mamba2, rms_norm


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
            x = x + mamba2(w, f"{name}.mixer", rms_norm(w, f"{name}.norm", x), documents, self.config)
        return F.linear(rms_norm(w, "norm", x), table)

    def empty_memory(self, rows: int) -> Tensor:
        """Return the ids before rows that begin: none."""
        return torch.empty(rows, 0, dtype=torch.long)

    def segment(self, ids: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (rows, T, 258) logits of ids that follow those of the memory, and both together."""
        every = torch.cat([memory, ids], 1)
        return self.logits(every)[:, memory.shape[1] :], every


if __name__ == "__main__":
    model = Model(*load(Path(__file__).parent))
    measure(model.logits, model.config["sequence_length"])
