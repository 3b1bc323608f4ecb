"""Tables of docs/guides/training/scale.md: the least time of a step and what ranks send, counted without a GPU.

python benchmarks/roofline.py [--write]

The passes run on the meta device, and each operation that a GPU would run as a kernel is counted. A product counts its
operations and its bytes, any other operation the bytes that it reads and writes. A kernel takes at least its operations
divided by the rate of products, and at least its bytes divided by the rate of memory (Williams et al. 2009).
Compilation merges operations that are not products. If it merged all of them into the products, only these would count.

The rates of GPUs and links are those of data sheets. No number here was measured on a GPU. `--write` puts the tables
into the page; a test compares them.
"""

import argparse
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from byteloom.core.torch_compat import ATTENTION, TorchDispatchMode, tree_leaves
from pretrain.engines.peak import DENSE_BF16_PEAK
from pretrain.estimate.activations import fused_attention, mean_loss, on_meta
from pretrain.models import ModelConfig, model_config

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/guides/training/scale.md"
CASES = (
    ("megabyte/pg19-best", 1),
    ("megabyte/pg19-best", 4),
    ("megabyte/pg19-best", 16),
    ("megabyte/text", 4),
    ("perceiver_ar/text-228m", 8),
    ("transformer/size-6.7b", 1),
    ("transformer/size-6.7b", 8),
    ("transformer_xl/enwik8-24-layers", 8),
)
SENT = (
    ("megabyte/pg19-best", 1),
    ("megabyte/pg19-best", 16),
    ("transformer/size-6.7b", 1),
    ("transformer/size-6.7b", 8),
)
NVLINK, NETWORK = 450e9, 50e9
"""Bytes a second that a GPU sends: within a node of H100 (NVLink 4), and over one 400 Gb/s port to other nodes."""
NODE = 8
aten = torch.ops.aten
PRODUCT_SHARE, MEMORY_SHARE = 0.75, 0.85
"""Assumed shares of the data sheet's rates that large kernels reach."""
KERNEL_SECONDS = 5e-6
"""Assumed time in which a host starts a kernel. A step cannot be faster than its kernels can be started."""
UPDATE_BYTES = 46
"""Bytes a parameter that the update reads and writes: the norm 4, clipping 8, AdamW 28, the bf16 copy 6."""
UPDATE_KERNELS = 100
"""Kernels of an update: fused AdamW and clipping take many parameters at once."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/guides/training/scale.md")
    if parser.parse_args().write:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(tables().values()))


def with_tables(page: str) -> str:
    """Return a page with each table between its two comments."""
    for name, table in tables().items():
        begin, end = f"<!-- roofline: {name} -->\n", "<!-- end -->"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}{table}\n{rest[rest.index(end) :]}"
    return page


@cache
def work_of(name: str, rows: int) -> "StepWork":
    tree = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text(encoding="utf-8"))
    return measure_work(model_config(tree["model"]), rows)


def tables() -> dict[str, str]:
    """Return the tables in Markdown, by name."""
    return {"steps": table_of_steps(), "sent": table_of_sent()}


def table_of_steps() -> str:
    """Return what a step of one micro-batch takes at least."""
    head = ["recipe", "micro-batch", "TFLOP", "GB moved", "FLOP a byte", "kernels"]
    for name in GPUS:
        head += [f"{name}: ms", "MFU", "MFU, merged"]
    lines = []
    for name, rows in CASES:
        work = work_of(name, rows)
        line = [f"`{name}`", str(rows), f"{work.flops / 1e12:.1f}", f"{work.bytes / 1e9:.0f}"]
        line += [f"{work.flops / work.bytes:.0f}", f"{len(work.kernels):,}"]
        for gpu in GPUS.values():
            line += [f"{work.seconds(gpu) * 1e3:.0f}", f"{work.mfu(gpu):.2f}", f"{work.mfu(gpu, merged=True):.2f}"]
        lines.append(line)
    return markdown(head, lines)


def table_of_sent() -> str:
    """Return what a rank sends in a step of one micro-batch, and how long that takes at least."""
    head = ["recipe", "micro-batch", "step on H100, ms", "`ddp`, `fsdp`: GB", "ms", "`hsdp`: GB in the node", "ms"]
    head += ["GB between nodes", "ms"]
    lines = []
    for name, rows in SENT:
        work = work_of(name, rows)
        everywhere = 8 * work.parameters  # ddp: 2 x 4 for gradients; fsdp: 4 for gradients, 2 x 2 for weights
        between = 2 * 4 * work.parameters / NODE
        line = [f"`{name}`", str(rows), f"{work.seconds(GPUS['H100']) * 1e3:.0f}"]
        for size, rate in ((everywhere, NETWORK), (everywhere, NVLINK), (between, NETWORK)):
            line += [f"{size / 1e9:.1f}", f"{size / rate * 1e3:.0f}"]
        lines.append(line)
    return markdown(head, lines)


def markdown(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


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


if __name__ == "__main__":
    main()
