"""Mamba-2 layer that model.py uses, position by position in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.references.layers import Weights, linear


def rms_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    """Divide by the root mean square over the last dimension, and multiply by a weight."""
    return F.rms_norm(x, x.shape[-1:], w[f"{name}.weight"], eps=1e-5)


def mamba2(w: Weights, name: str, x: Tensor, documents: Tensor, sizes: dict[str, int]) -> Tensor:
    """Apply a Mamba-2 layer to (rows, T, width), within documents. `sizes` has `head_width` and `state`."""
    state_size = sizes["state"]
    gate, values = linear(w, f"{name}.expand", x).chunk(2, -1)
    mixed = F.silu(_convolution(w, name, torch.cat([values, linear(w, f"{name}.select", x)], -1), documents))
    values, write, read = mixed.split([values.shape[-1], state_size, state_size], -1)
    heads = values.unflatten(-1, (-1, sizes["head_width"]))
    steps = F.softplus(linear(w, f"{name}.step", x) + w[f"{name}.step_bias"])
    decays = (-steps * w[f"{name}.log_rate"].exp()).exp()
    state, outputs = torch.zeros(*heads[:, 0].shape, state_size, dtype=x.dtype), []
    for t in range(x.shape[1]):
        goes_on = (documents[:, t] == documents[:, max(t - 1, 0)])[:, None, None, None]
        added = (steps[:, t, :, None] * heads[:, t])[..., None] * write[:, t, None, None]
        state = state * goes_on * decays[:, t, :, None, None] + added
        outputs.append((state * read[:, t, None, None]).sum(-1) + w[f"{name}.skip"][:, None] * heads[:, t])
    y = torch.stack(outputs, 1).flatten(-2)
    return linear(w, f"{name}.contract", rms_norm(w, f"{name}.norm", y * F.silu(gate)))


def _convolution(w: Weights, name: str, x: Tensor, documents: Tensor) -> Tensor:
    """Apply each channel's causal convolution to (rows, T, channels), within documents."""
    weight, length = w[f"{name}.convolution.weight"][:, 0], x.shape[1]
    total = w[f"{name}.convolution.bias"].expand_as(x)
    for age in range(weight.shape[1]):
        earlier = F.pad(x, (0, 0, age, 0))[:, :length]
        same = F.pad(documents, (age, 0), value=-1)[:, :length] == documents
        total = total + earlier * same[..., None] * weight[:, -1 - age]
    return total
