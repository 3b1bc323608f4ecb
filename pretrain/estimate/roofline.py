"""Time that a GPU needs at least for a training step, from counted operations and bytes.

The passes run on the meta device, and each operation that a GPU would run as a kernel is counted. A product counts its
operations and its bytes, any other operation the bytes that it reads and writes. A kernel takes at least its operations
divided by the rate of products, and at least its bytes divided by the rate of memory (Williams et al. 2009).

Compilation merges operations that are not products. If it merged all of them into the products, only these would count.
"""

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from byteloom.core.torch_compat import ATTENTION, TorchDispatchMode, tree_leaves
from pretrain.engines.peak import DENSE_BF16_PEAK
from pretrain.estimate.activations import fused_attention, mean_loss, on_meta
from pretrain.models import ModelConfig

aten = torch.ops.aten
PRODUCT_SHARE, MEMORY_SHARE = 0.75, 0.85
"""Assumed shares of the data sheet's rates that large kernels reach."""
KERNEL_SECONDS = 5e-6
"""Assumed time in which a host starts a kernel. A step cannot be faster than its kernels can be started."""
UPDATE_BYTES = 46
"""Bytes a parameter that the update reads and writes: the norm 4, clipping 8, AdamW 28, the bf16 copy 6."""
UPDATE_KERNELS = 100
"""Kernels of an update: fused AdamW and clipping take many parameters at once."""


class Gpu(NamedTuple):
    """Rates of a GPU, from its data sheet."""

    flops: float
    """Dense bf16 products, in FLOP/s."""
    bandwidth: float
    """Memory, in bytes a second."""


GPUS = {"H100": Gpu(DENSE_BF16_PEAK["H100"], 3.35e12), "H200": Gpu(DENSE_BF16_PEAK["H200"], 4.8e12)}
"""The SXM variants."""


class Kernel(NamedTuple):
    """Work of one operation."""

    flops: int
    bytes: int
    """Bytes that it reads and writes."""


@dataclass(frozen=True)
class StepWork:
    """Work of the passes over one micro-batch, and of the update."""

    flops: int
    """Operations of all products, forward and backward."""
    kernels: tuple[Kernel, ...]
    parameters: int

    @property
    def bytes(self) -> int:
        """Return the bytes that the passes read and write."""
        return sum(kernel.bytes for kernel in self.kernels)

    def seconds(self, gpu: Gpu, *, merged: bool = False) -> float:
        """Return the least seconds of a step of this one micro-batch.

        Args:
            gpu: that runs it.
            merged: whether operations that are no products take no time.
        """
        kernels = [kernel for kernel in self.kernels if kernel.flops] if merged else self.kernels
        rate, bandwidth = PRODUCT_SHARE * gpu.flops, MEMORY_SHARE * gpu.bandwidth
        passes = sum(max(kernel.flops / rate, kernel.bytes / bandwidth) for kernel in kernels)
        device = passes + UPDATE_BYTES * self.parameters / bandwidth
        return max(device, KERNEL_SECONDS * (len(kernels) + UPDATE_KERNELS))

    def mfu(self, gpu: Gpu, *, merged: bool = False) -> float:
        """Return the largest MFU of a step; the arguments are those of `seconds`."""
        return self.flops / self.seconds(gpu, merged=merged) / gpu.flops


def measure_work(config: ModelConfig, rows: int) -> StepWork:
    """Count the work of a micro-batch of full rows, in bf16 with all activations kept.

    Attention is one kernel a layer in each direction. Its operations are those of `ByteModel.flops` that no other
    product has.
    """
    model = on_meta(config).bfloat16()
    for block in model.units():
        block.forward = partial(fused_attention, block.forward)
    ids = torch.empty(rows, config.sequence_length, dtype=torch.int16, device="meta")
    with _Kernels() as counted:
        mean_loss(model, ids).backward()
    flops = 3 * rows * model.flops(config.sequence_length)
    rest = flops - sum(kernel.flops for kernel in counted.others)
    assert rest >= 0, "the passes do more products than the model's formula says"
    # Forward has a third of the operations of attention. Backward also reads and writes gradients.
    of_each = rest // (3 * len(counted.attention)) if counted.attention else 0
    attention = [Kernel(part * of_each, part * size) for size in counted.attention for part in (1, 2)]
    return StepWork(flops, (*counted.others, *attention), model.parameter_count())


class _Kernels(TorchDispatchMode):
    """Mode that counts the work of each operation that a GPU would run."""

    def __init__(self) -> None:
        super().__init__()
        self.others: list[Kernel] = []
        self.attention: list[int] = []
        """Bytes of each attention."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given, made = (_tensors(values) for values in ((args, kwargs), result))
        if _is_kernel(function, given, made):
            size = sum(tensor.numel() * tensor.element_size() for tensor in (*given, *made))
            if function in ATTENTION:
                self.attention.append(size)
            else:
                self.others.append(Kernel(_flops(function, args), size))
        return result


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _is_kernel(function: Any, given: list[Tensor], made: list[Tensor]) -> bool:
    """Return whether an operation reads or writes values: views and empty tensors do not."""
    if function in (aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default) or not made:
        return False
    storages = {tensor.untyped_storage()._cdata for tensor in given}
    is_view = all(tensor.untyped_storage()._cdata in storages for tensor in made)
    return not is_view or function._schema.is_mutable


def _flops(function: Any, args: Any) -> int:
    """Return the operations of a matrix product; 0 for other operations."""
    if function in (aten.mm.default, aten.mm.out, aten.bmm.default):
        a, b = args[:2]
    elif function is aten.addmm.default:
        a, b = args[1:3]
    else:
        return 0
    return 2 * prod(a.shape) * b.shape[-1]
