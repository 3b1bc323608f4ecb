"""Fused CUDA kernels of the authors for Mamba-2: the packages mamba-ssm and causal-conv1d.

They compute what `pretrain/models/blocks/mamba2.py` computes in plain torch, with fewer passes over memory. Documents
are their `seq_idx`. benchmarks/gpu.py compares both. The comparison has not been run on a GPU yet.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from byteloom.core.errors import CorrectableError
from byteloom.core.packages import needed_by

Kernel = Literal["plain", "auto", "fused"]
"""Choice of the kernels. plain: torch. fused: those of mamba-ssm and causal-conv1d. auto: fused where possible."""
CHANNELS_MULTIPLE = 8
"""Divisor of the channels that causal-conv1d takes with documents."""
USER = "model.kernel: fused"


class KernelError(CorrectableError):
    """A kernel that a model names does not run here."""


def takes_fused(kernel: Kernel, x: Tensor, channels: int, *, required: bool) -> bool:
    """Return whether the fused kernels compute a layer.

    Args:
        kernel: the choice of the config.
        x: input of the layer.
        channels: channels of the convolution.
        required: whether `fused` is refused where it is impossible, as in training. If not, plain torch replaces it.

    Raises:
        KernelError: the choice is fused, and the device or the channels do not fit.
        MissingPackageError: the choice is fused, and a package is not installed.
    """
    if kernel == "plain" or x.is_meta:  # memory is estimated on the meta device
        return False
    fault = None
    if x.device.type != "cuda":
        fault = f"it needs CUDA, and the device is {x.device.type}"
    elif channels % CHANNELS_MULTIPLE:
        fault = f"the convolution has {channels} channels, no multiple of {CHANNELS_MULTIPLE}"
    if kernel == "fused" and required:
        if fault is not None:
            raise KernelError(f"{USER}: {fault}; set it to auto or plain")
        _packages()
        return True
    return fault is None and x.dtype != torch.float64 and _are_installed()


def convolution(inputs: Tensor, weight: Tensor, bias: Tensor, documents: Tensor | None) -> Tensor:
    """Return SiLU of the causal convolution of each channel, which reads no earlier document.

    Args:
        inputs: (rows, n, channels)
        weight: (channels, taps)
        bias: (channels,)
        documents: (rows, n) document of each position; None if the convolution crosses documents.
    """
    convolve, _ = _packages()
    mixed: Tensor = convolve(inputs.transpose(1, 2), weight, bias, _numbers(documents), activation="silu")
    return mixed.transpose(1, 2)


def scan(
    x: Tensor,
    steps: Tensor,
    rates: Tensor,
    write: Tensor,
    read: Tensor,
    skip: Tensor,
    *,
    chunk: int,
    documents: Tensor | None,
) -> Tensor:
    """Return the outputs of the recurrence, the skip included.

    Args:
        x: (rows, n, heads, width)
        steps: (rows, n, heads) steps Δ.
        rates: (heads,) rates A, negative.
        write: (rows, n, state)
        read: (rows, n, state)
        skip: (heads,) factor of x in the output, D.
        chunk: positions of a chunk.
        documents: (rows, n) document of each position; None if the state crosses documents.

    Returns:
        (rows, n, heads, width)
    """
    _, combined = _packages()
    y: Tensor = combined(
        x, steps, rates, write[:, :, None], read[:, :, None], chunk, D=skip, seq_idx=_numbers(documents)
    )
    return y


def _numbers(documents: Tensor | None) -> Tensor | None:
    return None if documents is None else documents.to(torch.int32).contiguous()


@cache
def _are_installed() -> bool:
    return all(find_spec(name) is not None for name in ("mamba_ssm", "causal_conv1d"))


@cache
def _packages() -> tuple[Any, Any]:
    """Import the convolution and the scan."""
    with needed_by(USER, "causal-conv1d"):
        from causal_conv1d import causal_conv1d_fn  # noqa: PLC0415 optional, and slow to import
    with needed_by(USER, "mamba-ssm"):
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # noqa: PLC0415 likewise
    return causal_conv1d_fn, mamba_chunk_scan_combined
