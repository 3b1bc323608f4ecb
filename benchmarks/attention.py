"""Causal attention in bf16, forward and backward: Byteloom's attention and torch's fused kernel.

python benchmarks/attention.py [--quick] [--json PATH]

Heads have 64 channels. The longest keys are those of a Perceiver AR, whose latents are the last 1,024 of 8,192
positions. torch's kernel gets a mask, ours the first visible position. The two alternate. A ratio compares medians,
forward and backward together. An error is the distance to the fp32 result divided by the norm of that result; it is the
largest error of the output and of the gradients of queries, keys and values. `--quick` runs fewer rounds and skips the
longest keys. A CPU that emulates bf16 measures nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from common.report import Metric, interleaved, native_precisions, options, report
from pretrain.engines.process_state import keep_freed_memory
from pretrain.models.blocks.attention import CausalMask, attention, causal_attention, describe_attention

SHAPES = [  # rows, heads, queries, keys
    (4096, 4, 8, 8),
    (512, 4, 32, 32),
    (64, 8, 128, 128),
    (16, 8, 256, 256),
    (2, 8, 1024, 1024),
    (2, 8, 1024, 8192),
]
CHANNELS = 64
ROUNDS = 9


def main() -> None:
    chosen = options(__doc__)
    if "bf16" not in native_precisions():
        report("Causal attention in bf16, forward and backward", [], chosen.json)
        return
    keep_freed_memory()
    print(f"attention: {describe_attention(torch.device('cpu'), torch.bfloat16)}")
    shapes, rounds = (SHAPES[:-1], 3) if chosen.quick else (SHAPES, ROUNDS)
    metrics = [compare(*shape, dropout, rounds) for shape in shapes for dropout in (0.0, 0.1)]
    report("Causal attention in bf16, forward and backward", metrics, chosen.json)


def compare(rows: int, heads: int, queries: int, keys: int, dropout: float, rounds: int) -> Metric:
    """Return the speed of our attention relative to torch's, for one shape."""
    torch.manual_seed(0)
    q, grad_out = (random_heads(rows, heads, queries) for _ in range(2))
    k, v = (random_heads(rows, heads, keys) for _ in range(2))
    first = torch.full((rows,), keys - queries)
    mask = CausalMask(first).booleans(queries, keys) if keys > queries else None

    def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)

    def our_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if keys > queries:
            return attention(q, k, v, CausalMask(first), dropout)
        return causal_attention(q, k, v, dropout)

    functions = {"torch": torch_attention, "ours": our_attention}
    work: dict[str, Callable[[], object]] = {}
    for name, function in functions.items():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out = function(*inputs)
        work[f"{name} forward"] = lambda function=function, inputs=inputs: function(*inputs)
        work[f"{name} backward"] = lambda out=out, inputs=inputs: gradients(out, inputs, grad_out)
    seconds = interleaved(work, rounds)
    detail = "; ".join(
        f"{name} {seconds[f'{name} forward'] * 1e3:.0f} + {seconds[f'{name} backward'] * 1e3:.0f} ms"
        for name in functions
    )
    if not dropout:
        exact = with_gradients(torch_attention, [x.float() for x in (q, k, v)], grad_out.float())
        for name, function in functions.items():
            own = with_gradients(function, [q, k, v], grad_out)
            detail += f"; error of {name} {max(map(distance, own, exact)):.4f}"
    total = {name: seconds[f"{name} forward"] + seconds[f"{name} backward"] for name in functions}
    title = f"{rows:,} x {heads} x {queries:,} x {keys:,}" + (f", dropout {dropout}" if dropout else "")
    return Metric(title, total["torch"] / total["ours"], "times as fast", detail, 1.0)


def random_heads(rows: int, heads: int, length: int) -> Tensor:
    """Return random (rows, heads, length, channels), where the heads of a position are adjacent in memory."""
    return torch.randn(rows, length, heads, CHANNELS, dtype=torch.bfloat16).transpose(1, 2)


def gradients(out: Tensor, inputs: list[Tensor], grad_out: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, inputs, grad_out, retain_graph=True)


def with_gradients(function: Callable[..., Tensor], values: list[Tensor], grad_out: Tensor) -> tuple[Tensor, ...]:
    """Return the output of a function and the gradients of its inputs."""
    inputs = [x.detach().requires_grad_() for x in values]
    out = function(*inputs)
    return out.detach(), *gradients(out, inputs, grad_out)


def distance(own: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference divided by the norm of the exact value."""
    return float((own.float() - exact).norm() / exact.norm())


if __name__ == "__main__":
    main()
