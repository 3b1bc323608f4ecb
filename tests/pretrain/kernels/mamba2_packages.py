"""The packages mamba-ssm and causal-conv1d on a CPU: what they demand of a call, and what they return.

Demands are those of causal-conv1d 1.6.1 (csrc/causal_conv1d.cpp, causal_conv1d_fwd and causal_conv1d_bwd) and of
mamba-ssm 2.3.2 (ops/triton/ssd_combined.py), except that they demand CUDA. Results are sums in torch.
"""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Types of numbers. The packages do not take float64; it is here for exact comparisons."""


def modules() -> dict[str, ModuleType]:
    """Return the modules of both packages by name."""
    names = ("causal_conv1d", "mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton")
    convolutions, scans = ModuleType("causal_conv1d.cpp_functions"), ModuleType("mamba_ssm.ops.triton.ssd_combined")
    for own in (causal_conv1d_fwd_function, causal_conv1d_bwd_function):
        setattr(convolutions, own.__name__, own)
    for own in (_mamba_chunk_scan_combined_fwd, _mamba_chunk_scan_combined_bwd):
        setattr(scans, own.__name__, own)
    made = {name: ModuleType(name) for name in names}
    made["causal_conv1d"].cpp_functions = convolutions  # type: ignore[attr-defined]
    made["mamba_ssm.ops.triton"].ssd_combined = scans  # type: ignore[attr-defined]
    return made | {module.__name__: module for module in (convolutions, scans)}


def is_channel_last(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None) -> bool:
    """Check what both passes of causal-conv1d check, and return whether the channels of x are adjacent.

    Args:
        x: (batch, dim, seqlen)
        weight: (dim, width)
        bias: (dim,)
        seq_idx: (batch, seqlen)
    """
    assert x.dtype in FLOATS
    assert weight.dtype in FLOATS
    batch, dim, seqlen = x.shape
    assert weight.shape[0] == dim
    assert 2 <= weight.shape[1] <= 4
    assert x.stride(2) == 1 or x.stride(1) == 1
    last = x.stride(1) == 1 and x.stride(2) > 1
    if last:
        assert dim % 8 == 0
        assert x.stride(2) % 8 == 0
        assert x.stride(0) % 8 == 0
    assert bias.dtype == weight.dtype
    assert bias.stride(-1) == 1
    assert bias.shape == (dim,)
    if seq_idx is not None:
        assert last
        assert seq_idx.dtype == torch.int32
        assert seq_idx.is_contiguous()
        assert seq_idx.shape == (batch, seqlen)
    return last


def causal_conv1d_fwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    seq_idx: Tensor | None,
    initial_states: None,
    final_states_out: None,
    silu_activation: bool,
) -> Tensor:
    """Return SiLU of the convolution, in the type and the layout of x."""
    assert silu_activation
    is_channel_last(x, weight, bias, seq_idx)
    return torch.empty_like(x).copy_(F.silu(_sums(x, weight, bias, seq_idx)))


def causal_conv1d_bwd_function(  # noqa: PLR0913, PLR0917 the package's
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    dout: Tensor,
    seq_idx: Tensor | None,
    initial_states: None,
    dfinal_states: None,
    dx: None,
    return_dinitial_states: bool,
    silu_activation: bool,
) -> tuple[Tensor, Tensor, Tensor, None]:
    """Return the gradients of x, weight and bias, in their types."""
    assert silu_activation
    assert not return_dinitial_states
    assert dout.shape == x.shape
    if is_channel_last(x, weight, bias, seq_idx):
        assert dout.stride(1) == 1  # else it is copied
        assert dout.stride(2) % 8 == 0
        assert dout.stride(0) % 8 == 0
    sums, taps, length = _sums(x, weight, bias, seq_idx), weight.shape[1], x.shape[2]
    share = sums.sigmoid()
    above = dout.to(sums.dtype) * share * (1 + sums * (1 - share))
    grad_x, grad_weight = torch.zeros_like(sums), torch.zeros(weight.shape, dtype=sums.dtype)
    for back in range(taps):
        part = above if seq_idx is None else above * _same_document(seq_idx, back)
        grad_weight[:, taps - 1 - back] = (part * F.pad(x, (back, 0))[..., :length]).sum((0, 2))
        grad_x += F.pad(part * weight[:, taps - 1 - back, None], (0, back))[..., back:]
    return torch.empty_like(x).copy_(grad_x), grad_weight.to(weight.dtype), above.sum((0, 2)).to(bias.dtype), None


def _sums(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None) -> Tensor:
    taps, exact = weight.shape[1], torch.promote_types(x.dtype, torch.float32)
    total = bias[:, None].to(exact).expand(x.shape)
    for back in range(taps):
        part = F.pad(x.to(exact), (back, 0))[..., : x.shape[2]] * weight[:, taps - 1 - back, None].to(exact)
        total = total + (part if seq_idx is None else part * _same_document(seq_idx, back))
    return total


def _same_document(seq_idx: Tensor, back: int) -> Tensor:
    return (F.pad(seq_idx, (back, 0), value=-1)[:, : seq_idx.shape[1]] == seq_idx)[:, None]


def _check_scan(  # noqa: PLR0917 the package's
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor, seq_idx: Tensor | None
) -> None:
    batch, seqlen, heads, _ = x.shape
    assert B.shape == (batch, seqlen, 1, B.shape[-1])
    assert dt.shape == (batch, seqlen, heads)
    assert A.shape == D.shape == (heads,)
    assert C.shape == B.shape
    assert B.stride(-1) == C.stride(-1) == x.stride(-1) == D.stride(-1) == 1  # else they are copied
    assert x.dtype == B.dtype == C.dtype  # operands of a product have one type
    assert dt.dtype == A.dtype == D.dtype == torch.promote_types(x.dtype, torch.float32)  # else gradients are rounded
    assert chunk_size > 0
    if seq_idx is not None:
        assert seq_idx.shape == (batch, seqlen)
        assert seq_idx.dtype == torch.int32  # compared with constants of 32 bits


def _mamba_chunk_scan_combined_fwd(  # noqa: PLR0917 the package's
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor,
    seq_idx: Tensor | None,
) -> tuple[Tensor, None]:
    """Return the outputs first; B and C are (batch, seqlen, 1, state)."""
    _check_scan(x, dt, A, B, C, chunk_size, D, seq_idx)
    states = _states(x, dt, A, B, seq_idx)
    y = torch.einsum("nlhps,nls->nlhp", states, C[:, :, 0].to(dt.dtype)) + D[:, None] * x
    return y.to(x.dtype), None


def _mamba_chunk_scan_combined_bwd(  # noqa: PLR0913, PLR0917 the package's
    dout: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    out: Tensor,
    chunk_size: int,
    D: Tensor,
    seq_idx: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return the gradients of x, dt, A, B, C and D, each in the type of its tensor, and what has none."""
    _check_scan(x, dt, A, B, C, chunk_size, D, seq_idx)
    assert dout.shape == out.shape == x.shape
    assert dout.dtype == x.dtype  # operands of a product have one type
    states, kept = _states(x, dt, A, B, seq_idx), _kept(dt, A, seq_idx)
    above, values, write = dout.to(dt.dtype), x.to(dt.dtype), B[:, :, 0].to(dt.dtype)
    grad_x, grad_dt = D[:, None] * above, torch.zeros_like(dt)
    grad_a, grad_b = torch.zeros_like(A), torch.zeros_like(write)
    grad = torch.zeros_like(states[:, 0])
    for t in reversed(range(x.shape[1])):
        grad = grad + above[:, t, :, :, None] * C[:, t].to(dt.dtype)[..., None, :]
        read = (grad * write[:, t, None, None]).sum(-1)  # (batch, heads, width)
        decayed = kept[:, t] * (grad * states[:, t - 1]).sum((-1, -2)) if t else torch.zeros_like(dt[:, 0])
        grad_x[:, t] += dt[:, t, :, None] * read
        grad_b[:, t] = ((dt[:, t, :, None] * values[:, t])[..., None] * grad).sum((1, 2))
        grad_dt[:, t] = (values[:, t] * read).sum(-1) + A * decayed
        grad_a += (dt[:, t] * decayed).sum(0)
        grad = kept[:, t, :, None, None] * grad
    grad_c = torch.einsum("nlhps,nlhp->nls", states, above)
    groups = (grad_b[:, :, None].to(B.dtype), grad_c[:, :, None].to(C.dtype))
    return grad_x.to(x.dtype), grad_dt, grad_a, *groups, (above * values).sum((0, 1, 3)), None, None, None


def _kept(dt: Tensor, A: Tensor, seq_idx: Tensor | None) -> Tensor:
    """Return the share of the state before each position that is left there, (batch, seqlen, heads)."""
    decay = (dt * A).exp()
    if seq_idx is not None:
        decay = decay * (seq_idx == F.pad(seq_idx, (1, 0), value=-1)[:, :-1])[..., None]
    return decay


def _states(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, seq_idx: Tensor | None) -> Tensor:
    """Return the state after each position, (batch, seqlen, heads, width, state)."""
    kept, written = _kept(dt, A, seq_idx), (dt[..., None] * x)[..., None] * B[:, :, 0, None, None]
    states = [written[:, 0]]
    for t in range(1, x.shape[1]):
        states.append(kept[:, t, :, None, None] * states[-1] + written[:, t])
    return torch.stack(states, 1)
