"""FLOPs of a model whose patches follow the data, as a function of the mean size of patches.

A row is computed with as many patches as its capacity, and most rows have fewer. FLOPs with the empty places are those
of `ByteModel.flops`; FLOPs without them are what the patches alone need.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from pretrain.models import ByteModel

SIZES = (3.0, 4.0, 5.0, 6.0, 8.0)
"""Mean sizes of patches that are estimated by default, in bytes: from Chinese text to code by SpaceByte's rule."""


class PatchCost(NamedTuple):
    """Cost of rows whose patches have a mean size."""

    bytes_per_patch: float
    """Mean size of the patches of stage 0."""
    patches: list[float]
    """Patches of a row by stage."""
    flops: float
    """FLOPs of the forward pass over a row, without the empty places."""


def patch_costs(model: ByteModel, sizes: Sequence[float] = SIZES) -> list[PatchCost]:
    """Return the costs of full rows by mean size of patches, the capacity's own among them, smallest size first.

    Patches of further stages are in proportion to their capacities. Sizes below that of the capacity are left out: such
    rows have as many patches as the capacity.

    Args:
        model: the model; its patches follow the data.
        sizes: mean sizes of the patches of stage 0, in bytes.
    """
    length, slots = model.sequence_length, slots_of(model)
    smallest = length / slots[0]
    costs = []
    for size in sorted({smallest, *(each for each in sizes if smallest < each <= length)}):
        patches = [length / size * own / slots[0] for own in slots]
        costs.append(PatchCost(size, patches, model.useful_flops(length, patches)))
    return costs


def slots_of(model: ByteModel) -> list[int]:
    """Return the patches that a full row may have, by stage."""
    capacities = (patcher.capacity for patcher in model.patchers().values())
    return list(accumulate(capacities, min, initial=model.sequence_length))[1:]
