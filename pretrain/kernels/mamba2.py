"""Fused CUDA kernels of the authors for Mamba-2: the packages mamba-ssm and causal-conv1d.

They compute what `pretrain/models/blocks/mamba2.py` computes in plain torch, with fewer passes over memory. Documents
are their `seq_idx`. Both are operations of torch here: torch.compile does not look into them, because it cannot trace
causal-conv1d's function in one graph, and Mamba-2's scan, if it traces it, has given NaN (pytorch issue 146129).

The scan has run in Triton's interpreter, and its calls are tested (docs/guides/successors/mamba.md). No kernel has run
on a GPU yet; benchmarks/gpu.py compares them with plain torch there.
"""

import re
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from byteloom.core.errors import CorrectableError
from byteloom.core.packages import MissingPackageError, installed_version, needed_by
from byteloom.core.torch_compat import compiled_as_constant

Kernel = Literal["plain", "auto", "fused"]
"""Choice of the kernels. plain: torch. fused: those of mamba-ssm and causal-conv1d. auto: fused where possible."""
CHANNELS_MULTIPLE = 8
"""Divisor of the channels that causal-conv1d takes with documents."""
LARGEST_TENSOR = 2**31 - 1
"""Most numbers of a tensor. The scan computes places in 32 bits, and beyond reads and writes wrong ones (mamba issue
1015)."""
OLDEST = {"causal-conv1d": "1.6.0", "mamba-ssm": "2.3.0"}
"""Oldest versions. Earlier ones ignore `engine.deterministic`, and those of mamba-ssm do not import transformers 5."""
USER = "model.kernel: fused"


class KernelError(CorrectableError):
    """A kernel that a model names does not run here."""


def takes_fused(kernel: Kernel, x: Tensor, channels: int, largest: int, *, required: bool) -> bool:
    """Return whether the fused kernels compute a layer.

    Args:
        kernel: the choice of the config.
        x: input of the layer.
        channels: channels of the convolution.
        largest: numbers of the largest tensor; see `largest_tensor`.
        required: whether `fused` is refused where it is impossible, as in training. If not, plain torch replaces it.

    Raises:
        KernelError: the choice is fused, and the device, the precision or the sizes do not fit.
        MissingPackageError: the choice is fused, and a package is not installed or too old.
    """
    if kernel == "plain" or x.is_meta:  # memory is estimated on the meta device
        return False
    fault = unfit(x.device, x.dtype, channels, largest)
    if kernel == "fused" and required:
        if fault is not None:
            raise KernelError(f"{USER}: {fault}; set it to auto or plain")
        if (missing := missing_package()) is not None:
            raise MissingPackageError(missing)
        return True
    return fault is None and missing_package() is None


def unfit(device: torch.device, dtype: torch.dtype, channels: int, largest: int) -> str | None:
    """Return why the kernels cannot compute a layer, or None if they can; see `takes_fused` for the arguments."""
    if device.type != "cuda":
        return f"it needs CUDA, and the device is {device.type}"
    if dtype == torch.float64:
        return "it does not compute in float64"
    if channels % CHANNELS_MULTIPLE:
        return f"the convolution has {channels} channels, no multiple of {CHANNELS_MULTIPLE}"
    if largest > LARGEST_TENSOR:
        return f"one of its tensors would have {largest:,} numbers, and the most is {LARGEST_TENSOR:,}"
    return None


def largest_tensor(rows: int, length: int, *, heads: int, width: int, state: int, chunk: int) -> int:
    """Return the numbers of the largest tensor of the kernels.

    Args:
        rows: rows of the batch.
        length: positions of a row.
        heads: heads of the layer.
        width: channels of a head.
        state: numbers of the state for each channel.
        chunk: positions of a chunk.
    """
    chunks, blocks = -(-length // chunk), -(-chunk // 32)
    inputs = length * (heads * width + 2 * state)
    states = chunks * heads * width * state
    products = chunks * chunk * chunk
    decays = heads * chunks * chunk * blocks  # partial sums of their gradients
    return rows * max(inputs, states, products, decays)


def convolution(inputs: Tensor, weight: Tensor, bias: Tensor, documents: Tensor | None) -> Tensor:
    """Return SiLU of the causal convolution of each channel, which reads no earlier document.

    Args:
        inputs: (rows, n, channels)
        weight: (channels, taps)
        bias: (channels,)
        documents: (rows, n) document of each position; None if the convolution crosses documents.
    """
    mixed: Tensor = _convolve(inputs, weight, bias, _numbers(documents))
    return mixed


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
    y: Tensor = _scan([x, steps, rates, write, read, skip], _numbers(documents), chunk)
    return y


@compiled_as_constant
def missing_package() -> str | None:
    """Return what is wrong with the packages, if one is missing, broken or too old."""
    return _missing_package()


@cache
def _missing_package() -> str | None:
    for package, oldest in OLDEST.items():
        version = installed_version(package)
        if version is not None and _parts(version) < _parts(oldest):
            return (
                f"{USER} needs {package} {oldest} or newer, and {version} is installed: "
                f"pip install --no-build-isolation '{package}>={oldest}'"
            )
    try:
        _convolutions()
        _scans()
    except MissingPackageError as error:
        return str(error)
    return None


def _parts(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:3]]


def _numbers(documents: Tensor | None) -> Tensor | None:
    return None if documents is None else documents.to(torch.int32).contiguous()


@cache
def _convolutions() -> tuple[Any, Any]:
    """Return causal-conv1d's functions of the forward and the backward pass."""
    with needed_by(USER, "causal-conv1d"):
        from causal_conv1d import cpp_functions  # noqa: PLC0415 optional, and slow to import
    return cpp_functions.causal_conv1d_fwd_function, cpp_functions.causal_conv1d_bwd_function


@cache
def _scans() -> tuple[Any, Any]:
    """Return mamba-ssm's functions of the forward and the backward pass."""
    with needed_by(USER, "mamba-ssm"):
        from mamba_ssm.ops.triton import ssd_combined  # noqa: PLC0415 likewise
    return ssd_combined._mamba_chunk_scan_combined_fwd, ssd_combined._mamba_chunk_scan_combined_bwd


@torch.library.custom_op("byteloom::mamba2_convolution", mutates_args=())
def _convolve(inputs: Tensor, weight: Tensor, bias: Tensor, numbers: Tensor | None) -> Tensor:
    """Return the convolution, (rows, n, channels); `numbers` are the documents in int32."""
    forward, _ = _convolutions()
    mixed: Tensor = forward(inputs.contiguous().transpose(1, 2), weight, bias.contiguous(), numbers, None, None, True)
    return mixed.transpose(1, 2)


@_convolve.register_fake
def _(inputs: Tensor, weight: Tensor, bias: Tensor, numbers: Tensor | None) -> Tensor:
    return inputs.new_empty(inputs.shape)


@torch.library.custom_op("byteloom::mamba2_convolution_backward", mutates_args=())
def _convolve_backward(
    grad: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor, numbers: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of inputs, weight and bias."""
    _, backward = _convolutions()
    x, above = inputs.contiguous().transpose(1, 2), grad.contiguous().transpose(1, 2)
    grad_x, grad_weight, grad_bias, _ = backward(
        x, weight, bias.contiguous(), above, numbers, None, None, None, False, True
    )
    return grad_x.transpose(1, 2), grad_weight.contiguous(), grad_bias


@_convolve_backward.register_fake
def _(
    grad: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor, numbers: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return inputs.new_empty(inputs.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _keep_convolution(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _convolution_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_convolve_backward(grad, *ctx.saved_tensors), None


_convolve.register_autograd(_convolution_gradients, setup_context=_keep_convolution)


@torch.library.custom_op("byteloom::mamba2_scan", mutates_args=())
def _scan(given: list[Tensor], numbers: Tensor | None, chunk: int) -> Tensor:
    """Return the outputs.

    Args:
        given: x, steps, rates, write, read and skip of `scan`.
        numbers: the documents in int32.
        chunk: positions of a chunk.
    """
    forward, _ = _scans()
    x, steps, rates, write, read, skip = given
    out: Tensor = forward(x, steps, rates, write[:, :, None], read[:, :, None], chunk, D=skip, seq_idx=numbers)[0]
    return out


@_scan.register_fake
def _(given: list[Tensor], numbers: Tensor | None, chunk: int) -> Tensor:
    return given[0].new_empty(given[0].shape)


@torch.library.custom_op("byteloom::mamba2_scan_backward", mutates_args=())
def _scan_backward(grad: Tensor, given: list[Tensor], out: Tensor, numbers: Tensor | None, chunk: int) -> list[Tensor]:
    """Return the gradients of `given`."""
    _, backward = _scans()
    x, steps, rates, write, read, skip = given
    grads = backward(grad, x, steps, rates, write[:, :, None], read[:, :, None], out, chunk, D=skip, seq_idx=numbers)[
        : len(given)
    ]
    return [part.reshape(like.shape).contiguous() for part, like in zip(grads, given, strict=True)]


@_scan_backward.register_fake
def _(grad: Tensor, given: list[Tensor], out: Tensor, numbers: Tensor | None, chunk: int) -> list[Tensor]:
    return [like.new_empty(like.shape) for like in given]


def _keep_scan(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    given, numbers, ctx.chunk = inputs
    ctx.save_for_backward(*given, output, numbers)


def _scan_gradients(ctx: Any, grad: Tensor) -> tuple[list[Tensor], None, None]:
    *given, out, numbers = ctx.saved_tensors
    return _scan_backward(grad, given, out, numbers, ctx.chunk), None, None


_scan.register_autograd(_scan_gradients, setup_context=_keep_scan)
OPERATION = torch.ops.byteloom.mamba2_scan.default
"""Operation of the scan's forward pass, for torch's dispatcher."""
