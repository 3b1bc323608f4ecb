"""Check of a node's GPUs: `python -m launchers.checks.devices COUNT CHECK…` prints a JSON list of faults.

It is a process of its own, because a faulty GPU makes CUDA hang or abort.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch
from torch.cuda import nccl

from launchers.checks.report import NodeFault

ROWS, TERMS = 4096, 256
"""Sizes of the product: (ROWS, TERMS) by (TERMS, ROWS). Sums of 256 terms of -1, 0 or 1 are exact, also in bf16."""


def faults_of_devices(count: int, checks: Sequence[str]) -> Iterator[NodeFault]:
    """Yield what is wrong with the GPUs of this node.

    Args:
        count: number of GPUs that the job has asked for on each node.
        checks: names of the checks.
    """
    found = torch.cuda.device_count()
    if found < count:
        if "gpus" in checks:
            yield NodeFault("gpus", f"torch sees {found} GPUs, and the job has asked for {count}")
        return
    devices = [torch.device("cuda", index) for index in range(count)]
    if "product" in checks:
        for device in devices:
            yield from product_faults(device)
    if "all-reduce" in checks and count > 1:
        yield from all_reduce_faults(devices)


def product_faults(device: torch.device, rows: int = ROWS) -> Iterator[NodeFault]:
    """Yield a fault if a matrix product on a device is not the exact one.

    Args:
        device: where it is computed.
        rows: size of the square result.
    """
    generator = torch.Generator().manual_seed(1)
    left = torch.randint(-1, 2, (rows, TERMS), generator=generator).float()
    right = torch.randint(-1, 2, (TERMS, rows), generator=generator).float()
    exact = left @ right
    for kind in (torch.float32, torch.bfloat16):
        try:
            result = (left.to(device, kind) @ right.to(device, kind)).float().cpu()
        except RuntimeError as error:
            yield NodeFault("product", f"{device}: {str(error).splitlines()[0]}")
            return
        if wrong := int((result != exact).sum()):
            yield NodeFault("product", f"{device}: {wrong} of {rows * rows} values of a product in {kind} are wrong")


def all_reduce_faults(devices: Sequence[torch.device]) -> Iterator[NodeFault]:
    """Yield a fault if the sum over the GPUs of a node, through NCCL, is wrong on one of them."""
    values = [torch.full((1 << 20,), float(number), device=device) for number, device in enumerate(devices, 1)]
    exact = float(sum(range(1, len(devices) + 1)))
    try:
        nccl.all_reduce(values)
        wrong = [str(value.device) for value in values if not bool((value == exact).all())]
    except RuntimeError as error:
        yield NodeFault("all-reduce", str(error).splitlines()[0])
        return
    if wrong:
        yield NodeFault("all-reduce", f"the sum of the node's GPUs is wrong on {', '.join(wrong)}")


if __name__ == "__main__":
    print(json.dumps([asdict(fault) for fault in faults_of_devices(int(sys.argv[1]), sys.argv[2:])]))
