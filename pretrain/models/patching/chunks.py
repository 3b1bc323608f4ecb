"""Vectors of patches instead of positions, and back."""

import torch
from torch import Tensor


def chunk_places(starts: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Return the positions at which patches start, in order.

    Args:
        starts: (rows, n) booleans, at most `capacity` of them true in a row.
        capacity: patches that a row may have.

    Returns:
        (rows, min(capacity, n)) positions, and which of them are patches. The others come last; they are any positions.
    """
    slots = min(capacity, starts.shape[1])
    places = (~starts).int().argsort(dim=1, stable=True)[:, :slots]
    return places, torch.arange(slots, device=starts.device) < starts.sum(1, keepdim=True)


def gather(x: Tensor, places: Tensor) -> Tensor:
    """Return the vectors of (rows, n, width) at (rows, k) places: (rows, k, width)."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def add_at(x: Tensor, places: Tensor, used: Tensor, values: Tensor) -> Tensor:
    """Return (rows, n, width) vectors plus (rows, k, width) values at (rows, k) places, where they are used."""
    return x.scatter_add(1, places[..., None].expand_as(values), values * used[..., None])
