"""Part kernels: ways to compute the same, forward and backward, side by side."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.vocabulary import VOCABULARY
from gpu_parts import Row, Setting
from pretrain.kernels.rotary import turned
from pretrain.models.blocks import nats
from pretrain.models.blocks.attention import attention, causal_attention
from pretrain.models.blocks.documents import visible_in_patches
from pretrain.models.blocks.positions import Rotary, rotate

CHANNELS = 64
PATCHES = (4, 8, 16)
CHUNKS = (4096, 16384, 65536)


def rows(setting: Setting) -> Iterator[Row]:
    """Yield the time of each way, and of the others relative to the first."""
    yield from side_by_side(setting, "rotary positions", rotary(setting))
    for patch in setting.pick(PATCHES, PATCHES[:1]):
        for reach in (0, patch):
            title = f"local attention, patches of {patch} that see {reach} bytes before"
            yield from side_by_side(setting, title, local_attention(setting, patch, reach))
    yield from side_by_side(setting, "head and loss", head(setting))
    yield from side_by_side(setting, "head, columns", columns(setting))
    yield from side_by_side(setting, "casts of weights", casts(setting))
    yield from side_by_side(setting, "AdamW", adamw(setting))


Ways = dict[str, Callable[[], object]]


def side_by_side(setting: Setting, title: str, ways: Ways) -> Iterator[Row]:
    """Yield the milliseconds of each way, and its speed relative to the first."""
    first = None
    for name, work in ways.items():
        try:
            seconds = setting.seconds(work, calls=10)
        except (RuntimeError, NotImplementedError) as error:
            yield Row(f"{title}: {name}", None, "", f"left out: {str(error).splitlines()[0]}")
            continue
        first = first or seconds
        yield Row(f"{title}: {name}", seconds * 1e3, "ms", f"{first / seconds:.2f} times as fast as the first")


def heads(setting: Setting, rows_of_batch: int, count: int, length: int) -> Tensor:
    """Return random (rows, heads, length, channels) with a gradient."""
    shape = rows_of_batch, length, count, CHANNELS
    x = torch.randn(shape, device=setting.device, dtype=torch.bfloat16)
    return x.transpose(1, 2).requires_grad_()


def both_ways(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    """Return a forward and a backward pass of a function."""

    def work() -> object:
        out = function(*inputs)
        return torch.autograd.grad(out, inputs, torch.ones_like(out))

    return work


def rotary(setting: Setting) -> Ways:
    """Return rotation by our function, by operations in turn, and as the compiler fuses it with what is around."""
    x = heads(setting, *setting.pick((8, 32, 1024), (2, 2, 16)))
    angles, places = Rotary(), torch.arange(x.shape[2], device=x.device)
    turns = torch.rand(2, x.shape[2], CHANNELS // 2, device=x.device)
    ways: Ways = {
        "ours": both_ways(lambda x: rotate(x, places, angles), x),
        "operations in turn": both_ways(lambda x: turned(x, *turns), x),
    }
    if setting.is_cuda:
        ways["compiled"] = both_ways(torch.compile(lambda x: rotate(x, places, angles)), x)
    return ways


def local_attention(setting: Setting, patch: int, reach: int) -> Ways:
    """Return attention within patches and to the end of the previous one: by patch, and by row in FlexAttention."""
    batch, length = setting.pick((8, 8192), (2, 64))
    q, k, v = (heads(setting, batch * length // patch, 16, patch) for _ in range(3))
    documents = torch.zeros(batch, length, dtype=torch.long, device=setting.device)
    past = torch.ones(patch, patch, dtype=torch.bool, device=setting.device).tril()
    visible = F.pad(past, (reach, 0), value=True)

    def after_patch_before(x: Tensor) -> Tensor:
        x = x.unflatten(0, (batch, -1))
        return torch.cat([F.pad(x[:, :-1, :, patch - reach :], (0, 0, 0, 0, 0, 0, 1, 0)), x], 3).flatten(0, 1)

    def by_patch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not reach:
            return causal_attention(q, k, v, 0.0)
        return attention(q, after_patch_before(k), after_patch_before(v), visible)

    ways: Ways = {"by patch": both_ways(by_patch, q, k, v)}
    if setting.is_cuda:
        mask = visible_in_patches(documents, patch, reach, across_documents=True)
        of_rows = [heads(setting, batch, 16, length) for _ in range(3)]
        ways["by row"] = both_ways(lambda q, k, v: attention(q, k, v, mask), *of_rows)
    return ways


def head(setting: Setting) -> Ways:
    """Return the loss by chunks of several sizes, and from all logits at once."""
    count, width = setting.pick((65536, 1024), (256, 32))
    x = torch.randn(count, width, device=setting.device, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(VOCABULARY, width, device=setting.device, dtype=torch.bfloat16).requires_grad_()
    ids = torch.randint(VOCABULARY, (count,), device=setting.device)

    def chunked(size: int) -> Callable[[], object]:
        passes = both_ways(lambda x, weight: nats.linear_nats(x, ids, weight), x, weight)

        def work() -> object:
            before = nats.CPU_CHUNK, nats.CUDA_CHUNK
            nats.CPU_CHUNK = nats.CUDA_CHUNK = size
            try:
                return passes()
            finally:
                nats.CPU_CHUNK, nats.CUDA_CHUNK = before

        return work

    def whole(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), ids, reduction="none")

    ways: Ways = {f"chunks of {size:,}": chunked(size) for size in setting.pick(CHUNKS, (64,))}
    ways["all logits"] = both_ways(whole, x, weight)
    if setting.is_cuda:
        ways["all logits, compiled"] = both_ways(torch.compile(whole), x, weight)
    return ways


def columns(setting: Setting) -> Ways:
    """Return the product of the head by its number of columns."""
    count, width = setting.pick((65536, 1024), (256, 32))
    x = torch.randn(count, width, device=setting.device, dtype=torch.bfloat16).requires_grad_()
    ways: Ways = {}
    for size in (VOCABULARY, -(-VOCABULARY // 8) * 8, -(-VOCABULARY // 64) * 64):
        weight = torch.randn(size, width, device=setting.device, dtype=torch.bfloat16).requires_grad_()
        ways[f"{size} columns"] = both_ways(F.linear, x, weight)
    return ways


def casts(setting: Setting) -> Ways:
    """Return the bf16 copies of fp32 weights, in new memory and in memory that is kept."""
    count, size = setting.pick((200, 1 << 20), (4, 1 << 8))
    weights = [torch.randn(size, device=setting.device) for _ in range(count)]
    copies = [torch.empty(size, device=setting.device, dtype=torch.bfloat16) for _ in range(count)]
    return {
        "new copies": lambda: [weight.to(torch.bfloat16) for weight in weights],
        "kept copies": lambda: [copy.copy_(weight) for copy, weight in zip(copies, weights, strict=True)],
    }


def adamw(setting: Setting) -> Ways:
    """Return AdamW by torch's three implementations."""
    count, size = setting.pick((200, 1 << 20), (4, 1 << 8))
    ways: Ways = {}
    for name in ("fused", "foreach", "capturable"):
        if name == "capturable" and not setting.is_cuda:
            continue
        weights = [torch.randn(size, device=setting.device).requires_grad_() for _ in range(count)]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        ways[name] = torch.optim.AdamW(weights, lr=1e-4, **{name: True}).step
    return ways
