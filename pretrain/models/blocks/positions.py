"""Positions: rotary angles and sinusoids."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al. 2021): channels i and i + n/2 of a head's first n channels turn with the position."""

    fraction: float = 1.0
    """Share of a head's channels that turn; their number is rounded down to an even one."""
    longest_wavelength: float | None = None
    """Inverse of the lowest frequency, in positions a radian; see `frequencies`."""


def rotate(x: Tensor, places: Tensor, rotary: Rotary) -> Tensor:
    """Turn queries or keys by the angles of their positions. Angles are fp32 or more precise.

    Args:
        x: (rows, heads, length, d)
        places: (length,) or (rows, length) positions.
        rotary: channels that turn, and their frequencies.

    Returns:
        (rows, heads, length, d)
    """
    half = int(x.shape[-1] * rotary.fraction) // 2
    cos, sin = _turns(places, half, rotary.longest_wavelength, x.dtype)
    if places.dim() > 1:
        cos, sin = cos[:, None], sin[:, None]  # the same for all heads
    return _Turn.apply(x, cos, sin)


@torch.library.custom_op("byteloom::turns", mutates_args=())
def _turns(places: Tensor, half: int, longest_wavelength: float | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines, (..., half), of the rotary angles at places (...).

    This is an operation of its own because a compiler would fuse it into the loop that turns. It would then compute
    each angle again for each row and head, which takes two fifths of a compiled block of Perceiver AR on a CPU.
    """
    precise = torch.promote_types(dtype, torch.float32)
    angles = places[..., None] * frequencies(half, longest_wavelength, places.device, precise)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@_turns.register_fake
def _(places: Tensor, half: int, longest_wavelength: float | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (*places.shape, half)
    return places.new_empty(shape, dtype=dtype), places.new_empty(shape, dtype=dtype)


class _Turn(torch.autograd.Function):
    """Turn channels i and i + n/2 of the first n by angles whose cosines and sines are given, (..., n/2) each.

    The backward pass turns the gradient back. torch's own would add five padded tensors.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    turned = x.clone(memory_format=torch.contiguous_format)
    a, b = x[..., :half], x[..., half : 2 * half]
    turned[..., :half].mul_(cos).addcmul_(b, sin, value=-1)
    turned[..., half : 2 * half].mul_(cos).addcmul_(a, sin)
    return turned


def sinusoids(places: Tensor, width: int, longest_wavelength: float | None = None) -> Tensor:
    """Return sinusoidal position vectors: sines, then cosines, of angles with `frequencies`.

    Args:
        places: (n,) positions.
        width: channels; the last one is 0 if their number is odd.
        longest_wavelength: see `frequencies`.

    Returns:
        (n, width) fp32
    """
    angles = places[:, None] * frequencies(width // 2, longest_wavelength, places.device, torch.float32)
    return F.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2))


def frequencies(count: int, longest_wavelength: float | None, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return (count,) frequencies, in radians a position.

    Args:
        count: number of frequencies.
        longest_wavelength: frequencies fall from 1 to 1 / longest_wavelength, both included, as in Perceiver AR's code.
            None: they are 10,000^(-i / count), as in the papers of the Transformer and of rotary positions.
        device: device of the result.
        dtype: precision of the result.
    """
    steps = torch.arange(count, device=device, dtype=dtype)
    if longest_wavelength is None:
        return 10_000.0 ** (-steps / count)
    return longest_wavelength ** (-steps / max(count - 1, 1))
