"""Part mamba: the fused kernels of Mamba-2 compute what plain torch computes, and how much faster they are."""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from gpu_parts import Row, Setting
from gpu_parts.agreement import distance
from pretrain.kernels.mamba2 import Kernel
from pretrain.models import build_model, model_config

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
"""Largest error of a gradient. The kernels multiply fp32 in TF32, and round other numbers in bf16."""
ROWS, LENGTH = 4, 2048
SIZES = {"width": 512, "layers": 4, "head_width": 64, "state": 64, "chunk": 64, "initial_std": 0.02}


def rows(setting: Setting) -> Iterator[Row]:
    """Yield the error of nats and gradients, with and without documents, and the time of a pass."""
    for crosses in (True, False):
        for dtype, bound in TOLERANCE.items():
            exact = passes(setting, "plain", torch.float32, crosses=crosses)
            own = passes(setting, "fused", dtype, crosses=crosses)
            documents = "across documents" if crosses else "within documents"
            for what, ours, theirs in zip(("nats", "gradient"), own, exact, strict=True):
                error = distance(ours, theirs)
                yield Row(f"fused, {documents}, {dtype}: {what}", error, "", f"at most {bound:g}", error <= bound)
    for kernel in ("plain", "fused"):
        seconds = setting.seconds(
            lambda kernel=kernel: passes(setting, kernel, torch.bfloat16, crosses=True), rounds=3, calls=3
        )
        yield Row(f"{kernel}: a model and one forward and backward pass", seconds * 1e3, "ms")


def passes(setting: Setting, kernel: str, dtype: torch.dtype, *, crosses: bool) -> tuple[Tensor, Tensor]:
    """Return the nats and the gradient of all parameters of a pass over rows of several documents."""
    tree = {"family": "mamba", "sequence_length": LENGTH, "attention_across_documents": crosses} | SIZES
    torch.manual_seed(0)
    model = build_model(model_config(tree | {"kernel": cast(Kernel, kernel)})).to(setting.device, dtype)
    ids = torch.randint(0, 257, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0)).to(setting.device)
    nats = model(ids)
    nats.sum().backward()
    return nats, torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
