"""Plain torch in place of the CUDA kernels of goombalab/hnet and state-spaces/mamba, by their papers' equations."""

import importlib.util
import math
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def install(hnet: Path, mamba: Path) -> None:
    """Make the authors' modules importable without kernels.

    Args:
        hnet: clone of goombalab/hnet.
        mamba: clone of state-spaces/mamba.
    """
    sys.path.insert(0, str(hnet))
    unused = dict.fromkeys(  # `attend` takes their place
        (
            "flash_attn_kvpacked_func",
            "flash_attn_qkvpacked_func",
            "flash_attn_varlen_kvpacked_func",
            "flash_attn_varlen_qkvpacked_func",
            "flash_attn_with_kvcache",
        ),
        attend,
    )
    _module("flash_attn", **unused)
    _module("flash_attn.ops")
    _module("flash_attn.ops.triton")
    _module("flash_attn.ops.triton.layer_norm", RMSNorm=AddedRMSNorm)
    _module("flash_attn.ops.triton.rotary", apply_rotary=apply_rotary)
    _module("flash_attn.ops.activations", swiglu=lambda gate, x: F.silu(gate) * x)
    _module("flash_attn.utils")
    _module("flash_attn.utils.generation", GenerationMixin=object)
    _module("mamba_ssm").__path__ = [str(mamba / "mamba_ssm")]
    for name in ("mamba_ssm.modules", "mamba_ssm.ops"):
        _module(name).__path__ = [str(mamba / name.replace(".", "/"))]
    _module("mamba_ssm.ops.triton")
    _module("mamba_ssm.ops.triton.layernorm_gated", RMSNorm=GatedRMSNorm)
    _module("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=scan, mamba_split_conv1d_scan_combined=None)
    for name, members in (("optree", {}), ("huggingface_hub", {"PyTorchModelHubMixin": object})):
        if importlib.util.find_spec(name) is None:
            _module(name, **members)


def _module(name: str, **members: Any) -> types.ModuleType:
    module = sys.modules[name] = types.ModuleType(name)
    vars(module).update(members)
    return module


class AddedRMSNorm(nn.Module):
    """RMSNorm of a sum, as flash_attn has it."""

    def __init__(self, width: int, eps: float, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, residual: Tensor | None, prenorm: bool, residual_in_fp32: bool) -> Any:
        """Return the norm of x + residual, and the sum if `prenorm`."""
        total = x if residual is None else x + residual
        normed = F.rms_norm(total, total.shape[-1:], self.weight, self.eps)
        return (normed, total) if prenorm else normed


class GatedRMSNorm(nn.Module):
    """RMSNorm after a gate, as Mamba-2 has it."""

    def __init__(
        self, width: int, eps: float, norm_before_gate: bool, group_size: int, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        assert not norm_before_gate and group_size == width
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Return the norm of x times SiLU of the gate."""
        return F.rms_norm(x * F.silu(gate), x.shape[-1:], self.weight, self.eps)


def scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    **unused: Any,
) -> Tensor:
    """Return the outputs of the recurrence of Mamba-2 (arXiv:2405.21060), position by position, for one group.

    Args:
        x: (rows, n, heads, width)
        dt: (rows, n, heads)
        a: (heads,)
        b: (rows, n, 1, state)
        c: (rows, n, 1, state)
        chunk_size: of the kernel; it changes no result.
        D: (heads,) factor of x in the output.
        dt_bias: (heads,) added to dt.
        dt_softplus: whether dt goes through softplus.
        **unused: None, or without effect here.
    """
    assert not any(value is not None and value is not False for value in unused.values()), unused
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    state, outputs = torch.zeros(*x.shape[:1], *x.shape[2:], b.shape[-1]), []
    for t in range(x.shape[1]):
        decay = (dt[:, t] * a).exp()[..., None, None]
        state = decay * state + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        outputs.append((state * c[:, t, :, None]).sum(-1))
    y = torch.stack(outputs, 1)
    return y if D is None else y + D[:, None] * x


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, *, inplace: bool, **unused: Any) -> Tensor:
    """Turn the first channels of (rows, n, heads, width), the first half of them against the second."""
    half = cos.shape[-1]
    cos, sin = cos[: x.shape[1], None], sin[: x.shape[1], None]
    first, second = x[..., :half].clone(), x[..., half : 2 * half].clone()
    out = x if inplace else x.clone()
    out[..., :half], out[..., half : 2 * half] = first * cos - second * sin, second * cos + first * sin
    return out


def attend(layer: Any, qkv: Tensor, **unused: Any) -> Tensor:
    """Return causal attention over (rows, n, 3, heads, width), within the layer's window."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    places = torch.arange(q.shape[2])
    age = places[:, None] - places
    visible = (age >= 0) & ((age <= layer.window_size) | (layer.window_size < 0))
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~visible, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)
