"""Causal attention in bf16 by itself, forward and backward: what Byteloom's models call, beside torch's fused kernel.

python benchmarks/attention.py [--quick] [--json PATH]

Heads of 64 channels. The longest keys are those of a Perceiver AR, whose latents are the last 1,024 of 8,192 positions:
torch's kernel gets a mask, ours where the past begins. Both take turns; a ratio is of medians, forward and backward
together. An error is the distance to the same in fp32, in shares of its norm: the largest of what is attended and the
gradients of queries, keys and values. `--quick` is fewer rounds, without the longest. A CPU that emulates bf16 has
nothing to measure here.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.engines.process_state import keep_freed_memory
from pretrain.models.blocks.attention import CausalMask, attention, causal_attention, describe_attention
from report import Metric, interleaved, native_precisions, options, report

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
    metrics = [compared(*shape, dropout, rounds) for shape in shapes for dropout in (0.0, 0.1)]
    report("Causal attention in bf16, forward and backward", metrics, chosen.json)


def compared(rows: int, heads: int, queries: int, keys: int, dropout: float, rounds: int) -> Metric:
    torch.manual_seed(0)
    q, grad_out = (heads_of(rows, heads, queries) for _ in range(2))
    k, v = (heads_of(rows, heads, keys) for _ in range(2))
    first = torch.full((rows,), keys - queries)
    mask = CausalMask(first).booleans(queries, keys) if keys > queries else None

    def of_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)

    def of_ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if keys > queries:
            return attention(q, k, v, CausalMask(first), dropout)
        return causal_attention(q, k, v, dropout)

    ways = {"torch": of_torch, "ours": of_ours}
    work: dict[str, Callable[[], object]] = {}
    for name, way in ways.items():
        given = [x.detach().requires_grad_() for x in (q, k, v)]
        out = way(*given)
        work[f"{name} forward"] = lambda way=way, given=given: way(*given)
        work[f"{name} backward"] = lambda out=out, given=given: gradients(out, given, grad_out)
    seconds = interleaved(work, rounds)
    detail = "; ".join(
        f"{name} {seconds[f'{name} forward'] * 1e3:.0f} + {seconds[f'{name} backward'] * 1e3:.0f} ms" for name in ways
    )
    if not dropout:
        exact = with_gradients(of_torch, [x.float() for x in (q, k, v)], grad_out.float())
        for name, way in ways.items():
            own = with_gradients(way, [q, k, v], grad_out)
            detail += f"; error of {name} {max(map(distance, own, exact)):.4f}"
    total = {name: seconds[f"{name} forward"] + seconds[f"{name} backward"] for name in ways}
    title = f"{rows:,} x {heads} x {queries:,} x {keys:,}" + (f", dropout {dropout}" if dropout else "")
    return Metric(title, total["torch"] / total["ours"], "times as fast", detail, 1.0)


def heads_of(rows: int, heads: int, length: int) -> Tensor:
    """(rows, heads, length, channels), with a position's heads side by side, as linear maps leave them."""
    return torch.randn(rows, length, heads, CHANNELS, dtype=torch.bfloat16).transpose(1, 2)


def gradients(out: Tensor, given: list[Tensor], grad_out: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, given, grad_out, retain_graph=True)


def with_gradients(way: Callable[..., Tensor], values: list[Tensor], grad_out: Tensor) -> tuple[Tensor, ...]:
    given = [x.detach().requires_grad_() for x in values]
    out = way(*given)
    return out.detach(), *gradients(out, given, grad_out)


def distance(own: Tensor, true: Tensor) -> float:
    return float((own.float() - true).norm() / true.norm())


if __name__ == "__main__":
    main()
