"""Layers that model.py uses: loading, norms, attention and feed-forward layers in plain torch."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

SEPARATOR = 256
PADDING = 257
Weights = dict[str, Tensor]


def load(folder: Path) -> tuple[dict[str, Any], Weights]:
    """Return the model's config and its weights by name, from an export."""
    card = json.loads((folder / "card.json").read_text())
    return card["model"], {name: value for file in card["files"] for name, value in load_file(folder / file).items()}


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """Apply a linear map, with its bias if it has one."""
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    """Apply layer normalization over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-5)


def documents_of(ids: Tensor) -> Tensor:
    """Map (rows, T) ids to the document of each id; a separator is the last id of its document."""
    return F.pad((ids[:, :-1] == SEPARATOR).cumsum(1), (1, 0))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Map (..., n, width) to (..., heads, n, width / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Return attention over the visible keys, with the heads side by side: (..., n, width)."""
    scores = (q @ k.transpose(-1, -2) + bias) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return (weights @ v).transpose(-2, -3).flatten(-2)


def frequencies(count: int, longest: float | None) -> Tensor:
    """Return 10,000^(-i / count), or `count` frequencies that fall from 1 to 1 / longest, both included."""
    steps = torch.arange(count, dtype=torch.float64)
    return 10_000.0 ** (-steps / count) if longest is None else longest ** (-steps / max(count - 1, 1))


def rotate(x: Tensor, places: Tensor, half: int | None = None, longest: float | None = None) -> Tensor:
    """Turn channels i and i + half of each head by the angles place x frequency; other channels stay."""
    half = x.shape[-1] // 2 if half is None else half
    angles = places[:, None] * frequencies(half, longest)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def sinusoids(places: Tensor, width: int, longest: float | None = None) -> Tensor:
    """Map (n,) positions to (n, width): sines, then cosines; 0 in the last channel of an odd width."""
    angles = places[:, None] * frequencies(width // 2, longest)
    return F.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2))


def gated(x: Tensor) -> Tensor:
    """Return silu of the first half of the channels, times the second half."""
    gate, value = x.chunk(2, -1)
    return F.silu(gate) * value


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x) ** 2,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "swiglu": gated,
}


def feed_forward(w: Weights, name: str, x: Tensor, activation: str) -> Tensor:
    """Apply a feed-forward layer."""
    return linear(w, f"{name}.contract", ACTIVATIONS[activation](linear(w, f"{name}.expand", x)))


def block(w: Weights, name: str, x: Tensor, attention: Callable[[str, Tensor], Tensor], activation: str) -> Tensor:
    """Apply a pre-norm block: x + attention(norm(x)), then x + feed_forward(norm(x))."""
    x = x + attention(f"{name}.attention", norm(w, f"{name}.attention_norm", x))
    return x + feed_forward(w, f"{name}.feed_forward", norm(w, f"{name}.feed_forward_norm", x), activation)


def stack(
    w: Weights, name: str, x: Tensor, size: dict[str, Any], activation: str, visible: Sequence[Tensor], rotary: bool
) -> Tensor:
    """Apply the blocks of a stack, and its norm. The blocks have the masks `visible` in turn."""

    def attention(name: str, x: Tensor, visible: Tensor) -> Tensor:
        q, k, v = (split_heads(part, size["heads"]) for part in linear(w, f"{name}.query_key_value", x).chunk(3, -1))
        if rotary:
            q, k = (rotate(part, torch.arange(x.shape[-2])) for part in (q, k))
        return linear(w, f"{name}.output", attend(q, k, v, visible))

    for layer in range(size["layers"]):
        seen = visible[layer % len(visible)]
        x = block(w, f"{name}.blocks.{layer}", x, partial(attention, visible=seen), activation)
    return norm(w, f"{name}.norm", x)


def first_bytes(length: int) -> Tensor:
    """Return the (1, n) first bytes, at most `length`, of the file that the command names."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} FILE")
    try:
        content = Path(sys.argv[1]).read_bytes()[:length]
    except OSError as error:
        sys.exit(f"error: {sys.argv[1]}: {error.strerror}")
    if not content:
        sys.exit(f"error: {sys.argv[1]} is empty; there is no byte to score")
    return torch.tensor([list(content)])


def measure(logits: Callable[[Tensor], Tensor], length: int) -> None:
    """Print the bits per byte of the first `length` bytes of the file that the command names."""
    ids = first_bytes(length)
    with torch.no_grad():
        found = logits(ids)[0]
    nats = F.cross_entropy(found, ids[0, -len(found) :])
    print(f"{nats / math.log(2):.4f} bits per byte over {len(found)} bytes")
