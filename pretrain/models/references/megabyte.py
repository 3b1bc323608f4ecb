"""Forward pass of a Byteloom MEGABYTE in plain torch, for the weights in this folder."""

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
    block,
    documents_of,
    linear,
    load,
    measure,
    norm,
    rotate,
    split_heads,
    stack,
)


class Model:
    """Global model over patches of P bytes, and local model over the bytes of each patch."""

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        """Take the model's config and its weights by name."""
        self.config, self.w, self.P = config, weights, config["patch_size"]
        self.is_rotary = config["positions"] == "rotary"

    def logits(self, ids: Tensor) -> Tensor:
        """Map (rows, T) ids to (rows, T, 258) logits of each id, given the ids before it."""
        c, w, P, length = self.config, self.w, self.P, ids.shape[1]
        ids = F.pad(ids, (0, -length % P), value=PADDING)
        documents = documents_of(ids).unflatten(1, (-1, P))
        own = documents * (not c["attention_across_documents"])  # all one document, if attention crosses them

        places = torch.arange(own.shape[1])
        visible = (places[:, None] >= places) & (own[:, :, None, 0] == own[:, None, :, 0])  # patches of its document
        out = stack(
            w, "global_stack", self.patches(ids), c["global_model"], c["activation"], [visible[:, None]], self.is_rotary
        )
        conditioned = linear(w, "global_to_local", out.unflatten(2, (P, -1)))
        conditioned = torch.where((own != own[..., :1])[..., None], conditioned[:, :1], conditioned)
        if not self.is_rotary:
            conditioned = conditioned + w["local_positions"]
        before = w["local_embedding.weight"][ids.unflatten(1, (-1, P))[..., :-1]]
        pad = w["local_pad"].expand(*before.shape[:2], 1, -1)
        x = self.run_local(conditioned + torch.cat([pad, before], 2), documents, own)
        return (x @ w["local_embedding.weight"].T).flatten(1, 2)[:, :length]

    def patches(self, ids: Tensor) -> Tensor:
        """Map (rows, K·P) ids to the global model's inputs, (rows, K, P·D_G): the pad, then patches 0 to K - 2."""
        c, w = self.config, self.w
        x = w["global_embedding.weight"][ids]
        if not self.is_rotary:
            x = x + w["global_positions"][: ids.shape[1]]
        read = (ids == SEPARATOR).cumsum(1) * (not c["attention_across_documents"])
        if c["patch_encoder"] == "convolution":
            for index, size in enumerate((3, 5, 7)):
                near = F.pad(read, (size - 1, 0), value=-1).unfold(1, size, 1) == read[..., None]
                reached = F.pad(x, (0, 0, size - 1, 0)).unfold(1, size, 1) * near[:, :, None]
                x = x + torch.einsum("rnis,ois->rno", reached, w[f"patch_encoder.filters.{index}.weight"]).relu()
        read, x = read.unflatten(1, (-1, self.P)), x.unflatten(1, (-1, self.P))
        pad = w["global_pad"].expand(len(ids), 1, -1)
        x = torch.where((read == read[..., -1:])[..., None], x, w["global_pad"].view(self.P, -1)).flatten(2)
        return torch.cat([pad, x[:, :-1]], 1)

    def run_local(self, x: Tensor, documents: Tensor, own: Tensor) -> Tensor:
        """Run the local model over (rows, K, P, D_L); a patch also sees the last r positions of the previous patch."""
        c, w, P, r = self.config["local_model"], self.w, self.P, self.config["cross_patch_bytes"]

        def after_previous(x: Tensor) -> Tensor:
            return torch.cat([F.pad(x[:, :-1, :, P - r :], (0, 0, 0, 0, 0, 0, 1, 0)), x], 3)

        places = torch.arange(-r, P)
        past = (places[r:, None] >= places[r:]) & (own[..., None] == own[..., None, :])
        previous = F.pad(documents[:, :-1, P - r :], (0, 0, 1, 0), value=-1)  # none before patch 0
        visible = torch.cat([previous[..., None, :] == documents[..., None], past], -1)[:, :, None]

        def attention(name: str, x: Tensor) -> Tensor:
            q, k, v = (split_heads(part, c["heads"]) for part in linear(w, f"{name}.query_key_value", x).chunk(3, -1))
            k, v = after_previous(k), after_previous(v)
            if self.is_rotary or r:
                q, k = rotate(q, places[r:]), rotate(k, places)
            return linear(w, f"{name}.output", attend(q, k, v, visible))

        for layer in range(c["layers"]):
            x = block(w, f"local_stack.blocks.{layer}", x, attention, self.config["activation"])
        return norm(w, "local_stack.norm", x)


if __name__ == "__main__":  # python model.py FILE prints the bits per byte of the beginning of a file
    model = Model(*load(Path(__file__).parent))
    measure(model.logits, model.config["sequence_length"])
