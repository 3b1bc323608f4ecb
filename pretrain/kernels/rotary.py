"""Turning queries and keys by the angles of rotary positions, in fp32 or more precise, rounded once.

bf16 numbers that are turned in bf16 are rounded three times, and their cosines once more. Bytes moved a number:

    in bf16, three operations                 14
    in fp32, operation by operation           22
    in fp32, compiled to one loop              4    on CUDA, and in compiled blocks
    in fp32, in a CPU's cache                  8    on a CPU

Scores of one distance then deviate by the rounding of queries and keys alone: by 0.0023 where scores have a deviation
of 1. Only fp32 queries and keys deviate less, and their products take 15 times as long on an H100 (data sheet).
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

CACHED_NUMBERS = 1 << 17
"""Numbers that a CPU turns at a time: their fp32 copies fit into the cache of a core."""


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x, whose channels i and i + n/2 of the first n are turned.

    Args:
        x: (rows, heads, length, d)
        cos: cosines of the angles, (length, n/2) or (rows, 1, length, n/2), fp32 or more precise.
        sin: sines of the angles, as `cos`.
    """
    if torch.compiler.is_compiling():
        return turned(x, cos, sin)
    result: Tensor = _turn_in_cache(x, cos, sin) if x.device.type == "cpu" else _turn_in_one_loop(x, cos, sin)
    return result


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the same in plain operations, which a compiler fuses to one loop."""
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    wide_a, wide_b = a.to(cos.dtype), b.to(cos.dtype)
    first, second = wide_a * cos - wide_b * sin, wide_b * cos + wide_a * sin
    return torch.cat([first.to(x.dtype), second.to(x.dtype), rest], -1)


def _turn_in_cache(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the same, some rows at a time. Loops over whole heads are faster than loops over halves of them."""
    out, turning = x.clone(memory_format=torch.contiguous_format), 2 * cos.shape[-1]
    cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    rows = max(CACHED_NUMBERS // max(x[:1].numel(), 1), 1)
    for first in range(0, len(x), rows):
        part = out[first : first + rows, ..., :turning]
        row_cos, row_sin = (t[first : first + rows] if t.dim() == 4 else t for t in (cos, sin))
        wide = part.to(cos.dtype)
        swapped = wide.roll(turning // 2, -1)
        wide.mul_(row_cos).addcmul_(swapped, row_sin)
        if x.dtype != cos.dtype:
            part.copy_(wide)
    return out


@torch.library.custom_op("byteloom::turn", mutates_args=())
def _turn_in_one_loop(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the same by compiled code. It is an operation, so that modes which watch operations do not enter it."""
    out: Tensor = _compiled(turned)(x, cos, sin)
    return out.contiguous()


@_turn_in_one_loop.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_compiled: Callable[..., Any] = cache(torch.compile)
