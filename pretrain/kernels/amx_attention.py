"""Causal attention in bf16 on a CPU with AMX: amx_attention.cpp, which is compiled at first use.

torch's kernel uses AMX only in the forward pass, and does not support dropout. inductor's cache of compiled blocks
identifies an operation by its name alone, so an operation whose arguments change needs a new name.

The compiled library is in the user's cache. Its name depends on the source, torch and the compiler's options. One
process compiles it under a lock while others wait.

The compiler is called directly, not through torch.utils.cpp_extension, for two reasons (torch 2.13, 2 cores):

- A killed build leaves the lock file of cpp_extension behind, and every later build waits for it without end.
- If the library is in the cache, each rank needs 0.5 to 0.7 s to import cpp_extension and 0.03 s to load the library
  with it. Loading the library directly takes 0.001 s. A build takes about as long either way: 19 s and 20 s.
"""

import ctypes
import hashlib
import logging
import math
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from byteloom.core.storage.locations import user_cache
from byteloom.core.storage.locks import lock_file
from byteloom.core.torch_compat import compiled_as_constant, cpu_capabilities

log = logging.getLogger(__name__)

SHORTEST = 128
"""Fewest queries and fewest keys that the kernel takes: one tile. For fewer, two products and a softmax are faster."""
CHANNELS = 32
"""Divisor of a head's channels: one product reads this many at once."""
_NEEDED = ("amx_bf16", "avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")
_SOURCE = Path(__file__).with_suffix(".cpp")
_TORCH = Path(torch.__file__).parent
_OPTIONS = [
    *("-std=c++20", "-O3", "-march=x86-64-v4", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math"),
    *("-shared", "-fPIC", "-fopenmp", "-DAT_PARALLEL_OPENMP=1", f"-I{_TORCH / 'include'}"),
    *(f"-L{_TORCH / 'lib'}", "-ltorch_cpu", "-lc10"),
]


def takes(q: Tensor, k: Tensor) -> bool:
    """Return whether the kernel takes these (rows, heads, length, d) queries and keys, and is available."""
    return (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and min(q.shape[2], k.shape[2]) >= SHORTEST
        and q.shape[3] % CHANNELS == 0
        and is_available()
    )


@compiled_as_constant
def is_available() -> bool:
    """Return whether this machine can run the kernel. The first call compiles it, and logs a failure."""
    return _library() is not None


def causal_attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor, dropout: float) -> Tensor:
    """Return attention in which query i of a row sees the keys up to first + i.

    Args:
        q: (rows, heads, queries, d)
        k: (rows, heads, keys, d)
        v: (rows, heads, keys, d)
        first: (rows,), 0 or more.
        dropout: share of attention weights that is dropped.

    Returns:
        (rows, heads, queries, d)
    """
    seed = torch.randint(2**62, ()) if dropout else torch.zeros((), dtype=torch.long)
    out: Tensor = _forward(q, k, v, first, dropout, seed)[0]
    return out


@torch.library.custom_op("byteloom::amx_attention", mutates_args=(), device_types="cpu")
def _forward(q: Tensor, k: Tensor, v: Tensor, first: Tensor, dropout: float, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention, and the binary logarithm of each query's normalizer, (rows, heads, queries) fp32."""
    out, lse = _empty(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    _run("attention_forward", {"q": q, "k": k, "v": v, "out": out}, lse, first, dropout, seed)
    return out, lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, first: Tensor, dropout: float, seed: Tensor) -> tuple[Tensor, Tensor]:
    return _empty(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("byteloom::amx_attention_backward", mutates_args=(), device_types="cpu")
def _backward(kept: list[Tensor], grad_out: Tensor, dropout: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values, from the tensors that `_keep` kept."""
    q, k, v, out, lse, first, seed = kept
    grad_q, grad_k, grad_v = _empty(q), _empty(k), _empty(v)
    given = {"q": q, "k": k, "v": v, "out": out, "grad_out": grad_out}
    wanted = {"grad_q": grad_q, "grad_k": grad_k, "grad_v": grad_v}
    _run("attention_backward", given | wanted, lse, first, dropout, seed)
    return grad_q, grad_k, grad_v


@_backward.register_fake
def _(kept: list[Tensor], grad_out: Tensor, dropout: float) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, *_ = kept
    return _empty(q), _empty(k), _empty(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, first, ctx.dropout, seed = inputs
    ctx.save_for_backward(q, k, v, *output, first, seed)


def _gradients(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(list(ctx.saved_tensors), grad_out, ctx.dropout), None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)
OPERATION = torch.ops.byteloom.amx_attention.default
"""Operation of the forward pass, for torch's dispatcher."""


@register_flop_formula(torch.ops.byteloom.amx_attention)
def _forward_flops(q_shape: list[int], k_shape: list[int], *_: Any, **__: Any) -> int:
    """Return the operations of two full products, as torch counts its own kernels."""
    return 4 * math.prod(q_shape) * k_shape[2]


@register_flop_formula(torch.ops.byteloom.amx_attention_backward)
def _backward_flops(kept_shapes: list[list[int]], *_: Any, **__: Any) -> int:
    """Return the operations of five full products; one recomputes the scores."""
    q_shape, k_shape = kept_shapes[:2]
    return 10 * math.prod(q_shape) * k_shape[2]


def _empty(like: Tensor) -> Tensor:
    """Return an empty (rows, heads, length, d) tensor in the layout of the linear maps around attention.

    The heads of a position are adjacent in memory.
    """
    rows, heads, length, channels = like.shape
    return like.new_empty(rows, length, heads, channels).transpose(1, 2)


class _Heads(ctypes.Structure):
    """Data and strides of one tensor; the struct Heads of amx_attention.cpp."""

    _fields_: ClassVar = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("row", "head", "place"))]


class _Attention(ctypes.Structure):
    """Arguments of the kernel; the struct Attention of amx_attention.cpp."""

    _fields_: ClassVar = [
        *((name, _Heads) for name in ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")),
        *((name, ctypes.c_void_p) for name in ("lse", "first")),
        *((name, ctypes.c_int64) for name in ("rows", "heads", "queries", "keys", "channels")),
        *((name, ctypes.c_float) for name in ("scale", "dropout")),
        ("seed", ctypes.c_int64),
    ]


def _run(name: str, heads: dict[str, Tensor], lse: Tensor, first: Tensor, dropout: float, seed: Tensor) -> None:
    library = _library()
    assert library is not None
    heads = {name: x if x.stride(3) == 1 else x.contiguous() for name, x in heads.items()}
    first = first.contiguous()
    rows, count, queries, channels = heads["q"].shape
    problem = _Attention(
        **{name: _Heads(x.data_ptr(), *x.stride()[:3]) for name, x in heads.items()},
        lse=lse.data_ptr(),
        first=first.data_ptr(),
        rows=rows,
        heads=count,
        queries=queries,
        keys=heads["k"].shape[2],
        channels=channels,
        scale=channels**-0.5,
        dropout=dropout,
        seed=int(seed),
    )
    library[name](ctypes.byref(problem))


@cache
def _library() -> ctypes.CDLL | None:
    if not all(cpu_capabilities().get(name) for name in _NEEDED):
        return None
    command = [os.environ.get("CXX", "c++"), str(_SOURCE), *_OPTIONS]
    try:
        return ctypes.CDLL(str(compiled_library(command)))
    except (OSError, subprocess.CalledProcessError) as error:
        why = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        log.warning("the fast kernel for bf16 attention did not compile; torch's is used, at half the speed: %s", why)
        return None


def compiled_library(command: list[str]) -> Path:
    """Return the path of the compiled library. The first process compiles it while others wait."""
    key = hashlib.sha256(repr((command, torch.__version__)).encode() + _SOURCE.read_bytes()).hexdigest()[:16]
    folder = user_cache()
    path = folder / f"amx_attention-{key}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with lock_file(folder / "amx_attention.lock"):
        if not path.exists():
            partial = path.with_suffix(".partial")
            subprocess.run([*command, "-o", str(partial)], check=True, capture_output=True, text=True)
            partial.replace(path)
    return path
