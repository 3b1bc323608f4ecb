"""Positions: rotary angles and sinusoids."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.kernels.rotary import turn

ROTARY_BASE = 10_000.0
"""Base of the angles of `Rotary` without a longest wavelength."""
CHUNK = 4096
"""Positions whose angles exist at once in float64."""


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al. 2021): channels i and i + n/2 of a head's first n channels turn with the position."""

    fraction: float = 1.0
    """Share of a head's channels that turn; their number is rounded down to an even one."""
    longest_wavelength: float | None = None
    """Inverse of the lowest frequency, in positions a radian; see `frequencies`."""

    @classmethod
    def of_base(cls, base: float, head_width: int, fraction: float = 1.0) -> "Rotary":
        """Return the angles base^(-i / n) of the n pairs of channels that turn in a head."""
        if base == ROTARY_BASE:
            return cls(fraction)
        pairs = int(head_width * fraction) // 2
        return cls(fraction, base ** ((pairs - 1) / max(pairs, 1)))


def rotate(x: Tensor, places: Tensor, rotary: Rotary) -> Tensor:
    """Turn queries or keys by the angles of their positions. Compute in fp32 or more precise, and round once.

    Args:
        x: (rows, heads, length, d)
        places: (length,) or (rows, length) positions.
        rotary: channels that turn, and their frequencies.

    Returns:
        (rows, heads, length, d)
    """
    (result,) = rotate_alike((x,), places, rotary)
    return result


def rotate_alike(xs: Sequence[Tensor], places: Tensor, rotary: Rotary) -> list[Tensor]:
    """Turn several tensors of the same width and type at the same positions; see `rotate`."""
    half = int(xs[0].shape[-1] * rotary.fraction) // 2
    precise = torch.promote_types(xs[0].dtype, torch.float32)
    cos, sin = _turns(places, half, rotary.longest_wavelength, precise)
    if places.dim() > 1:
        cos, sin = cos[:, None], sin[:, None]  # the same for all heads
    return [_Turn.apply(x, cos, sin) for x in xs]


@torch.library.custom_op("byteloom::turns", mutates_args=())
def _turns(places: Tensor, half: int, longest_wavelength: float | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines, (..., half), of the rotary angles at places (...).

    Angles are float64: in fp32, that of place 1,000,000 is wrong by up to 0.03 radians.

    This is an operation of its own because a compiler would fuse it into the loop that turns. It would then compute
    each angle again for each row and head, which takes two fifths of a compiled block of Perceiver AR on a CPU.
    """
    angles = places[..., None] * frequencies(half, longest_wavelength, places.device, torch.double)
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
        return turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return turn(gradient, cos, -sin), None, None


def sinusoids(places: Tensor, width: int, longest_wavelength: float | None = None) -> Tensor:
    """Return sinusoidal position vectors: sines, then cosines, of angles with `frequencies`.

    Angles are float64. In fp32, an angle of 131,070 radians is wrong by 6e-3.

    Args:
        places: (n,) positions.
        width: channels; the last one is 0 if their number is odd.
        longest_wavelength: see `frequencies`.

    Returns:
        (n, width) fp32
    """
    turns = frequencies(width // 2, longest_wavelength, places.device, torch.float64)

    def rows(part: Tensor) -> Tensor:
        angles = part[:, None] * turns
        return F.pad(torch.cat([angles.sin().float(), angles.cos().float()], 1), (0, width % 2))

    return torch.cat([rows(part) for part in places.split(CHUNK)])


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
        return ROTARY_BASE ** (-steps / count)
    return longest_wavelength ** (-steps / max(count - 1, 1))
