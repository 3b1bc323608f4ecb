"""Forward pass of a Byteloom encoder in plain torch, for the weights in this folder.

`python model.py FILE` prints the bits of the byte in the middle of the beginning of a file, which is masked.
"""

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pretrain.models.references.encoding import embed, measure_masked, place, seen, stack
from pretrain.models.references.layers import Weights, load


class Model:
    """Bidirectional Transformer encoder."""

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        """Take the model's config and its weights by name."""
        self.config, self.w = config, weights

    def logits(self, ids: Tensor, given: Tensor) -> Tensor:
        """Map (rows, T) ids that are read to (rows, T, 258) logits of the ids behind them; `ids` are not read."""
        c, w = self.config, self.w
        states = stack(w, "stack", place(w, "read", embed(w, given, c), c), c, c["layers"], seen(given))
        return F.linear(states, w["read.table.weight"][:258], w["head_bias"] if c["biases"] else None)


if __name__ == "__main__":
    model = Model(*load(Path(__file__).parent))
    measure_masked(model.logits, model.config["sequence_length"])
