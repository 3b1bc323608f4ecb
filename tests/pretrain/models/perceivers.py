"""Small Perceiver AR models for tests."""

import torch
from torch import Tensor

from pretrain.models.families.perceiver_ar import PerceiverAR, PerceiverARConfig

ROWS, T, N = 2, 24, 8
IMAGE = (2, 4, 3)


def build(double: bool = True, **changes: object) -> PerceiverAR:
    fields = {
        "sequence_length": T,
        "latents": N,
        "latent_model": {"width": 32, "layers": 2, "heads": 4},
        "cross_heads": 2,
        "dropout": 0.0,
        "zero_head": False,
    }
    torch.manual_seed(0)
    model = PerceiverAR(PerceiverARConfig.model_validate(fields | changes)).eval()
    return model.double() if double else model


def layers(count: int) -> dict[str, object]:
    return {"latent_model": {"width": 32, "layers": count, "heads": 4}}


def random_ids(rows: int = ROWS, length: int = T, seed: int = 1) -> Tensor:
    return torch.randint(0, 257, (rows, length), generator=torch.Generator().manual_seed(seed))


def log_probabilities(model: PerceiverAR, ids: Tensor, latents: int | None = None) -> Tensor:
    """Return log probabilities (rows, N, VOCABULARY) of every id at the last N positions."""
    model.latents, own = latents or model.latents, model.latents
    rows, length = ids.shape
    logits = model.logits(model.read(ids, model.place_latents(torch.full((rows,), length), length)))
    model.latents = own
    return logits.log_softmax(-1)


KINDS = {
    "rotary": {"positions": "rotary"},
    "learned": {"positions": "learned"},
    "sinusoidal": {"positions": "sinusoidal"},
    "image": {"positions": "image", "image": IMAGE},
    "several cross-attends": {"cross_attend_after": [0, 1]},
    "wide inputs": {"input_width": 48, "cross_heads": 6, "positions": "learned"},
}
