"""Forward pass of a Byteloom Perceiver AR in plain torch, for the weights in this folder."""

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
    sinusoids,
    split_heads,
)

START = 258


class Model:
    """Cross-attends from N latents to T inputs, and causal blocks over the latents."""

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        """Take the model's config and its weights by name."""
        self.config, self.w = config, weights

    def logits(self, ids: Tensor) -> Tensor:
        """Map (rows, T) ids to (rows, n, 258) logits of the last n = min(N, T) ids, given the ids before them."""
        c, w, length = self.config, self.w, ids.shape[1]
        read = F.pad(ids[:, :-1], (1, 0), value=START)
        inputs = self.embed(read)
        places = torch.arange(length)[-c["latents"] :]
        z = linear(w, "to_latents", inputs[:, places])
        visible = (places[:, None] >= torch.arange(length))[None, None]
        if not c["attention_across_documents"]:
            documents = (read == SEPARATOR).cumsum(1)
            visible = visible & (documents[:, places, None] == documents[:, None])[:, None]

        def cross(name: str, z: Tensor) -> Tensor:
            source = norm(w, name.removesuffix("attention") + "input_norm", inputs)
            q = split_heads(linear(w, f"{name}.query", z), c["cross_heads"])
            k, v = (split_heads(x, c["cross_heads"]) for x in linear(w, f"{name}.key_value", source).chunk(2, -1))
            q, k = self.turn(q, places), self.turn(k, torch.arange(length))
            return linear(w, f"{name}.output", attend(q, k, v, visible))

        def within(name: str, z: Tensor) -> Tensor:
            parts = linear(w, f"{name}.query_key_value", z).chunk(3, -1)
            q, k, v = (split_heads(part, c["latent_model"]["heads"]) for part in parts)
            q, k = self.turn(q, places), self.turn(k, places)
            return linear(w, f"{name}.output", attend(q, k, v, visible[..., places]))

        attentions = [cross]
        for layer in range(c["latent_model"]["layers"]):
            attentions += [within] + [cross] * (layer in c["cross_attend_after"])
        for index, attention in enumerate(attentions):
            z = block(w, f"blocks.{index}", z, attention, c["activation"])
        return linear(w, "head", norm(w, "norm", z))[..., :START]

    def embed(self, read: Tensor) -> Tensor:
        """Map (rows, T) inputs, which are START and ids, to (rows, T, W): embeddings and positions."""
        c, w, places = self.config, self.w, torch.arange(read.shape[1])
        x = w["embedding.weight"][read]
        if c["positions"] == "sinusoidal":
            return x + sinusoids(places, x.shape[2], longest=10_000).to(x.dtype)
        if c["positions"] == "learned":
            return x + w["position_tables.0"][places]
        if c["positions"] == "image":
            _, width, channels = c["image"]
            byte = places - 1  # START is before the image
            axes = [byte // channels % width, byte // channels // width, byte % channels]
            for index, axis in enumerate(axes):
                x = x + w[f"position_tables.{index}"][torch.where(places == 0, 1, axis + 2)]
        return x

    def turn(self, x: Tensor, places: Tensor) -> Tensor:
        """Turn the first channels of queries or keys, if positions are rotary."""
        if self.config["positions"] != "rotary":
            return x
        half = int(x.shape[-1] * self.config["rotary_fraction"]) // 2
        return rotate(x, places, half, longest=self.config["sequence_length"])


if __name__ == "__main__":  # python model.py FILE prints the bits per byte of the last latents
    model = Model(*load(Path(__file__).parent))
    measure(model.logits, model.config["sequence_length"])
