"""Part agreement: the device computes what the CPU computes in fp32.

An error is the norm of a difference divided by the norm of the CPU's value in fp32. In bf16, the CPU itself has an
error, and that of the device is held to it: both round the same products, and kernels round other numbers between them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_parts import Row, Setting
from gpu_parts.models import FAMILIES, batch_of, engine_of, random_ids
from pretrain.models import ByteModel, ModelConfig, build_model, small_config
from pretrain.models.blocks.attention import attention, causal_attention, window_attention
from pretrain.models.registry import carries_memory

TOLERANCE = 1e-4
"""Largest error in fp32. A product of 1,000 numbers that is added in another order has an error of about 1e-6."""
BF16_FACTOR = 2.0
"""Largest error in bf16, relative to the error of the CPU in bf16, unless it is below `TOLERANCE`."""
PRECISIONS = (torch.float32, torch.bfloat16)
CPU = torch.device("cpu")
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
LENGTHS = (1, 7, 64, 65, 257, 1000)
CHANNELS = (8, 64, 80)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in FAMILIES},
    "megabyte, all options": (
        "megabyte",
        {"cross_patch_bytes": 4, "patch_encoder": "convolution", "positions": "rotary"},
    ),
    "megabyte, within documents": ("megabyte", {"attention_across_documents": False}),
    "transformer, window": ("transformer", {"window": 8}),
}
"""Models by title: the family, and its fields."""


def rows(setting: Setting) -> Iterator[Row]:
    """Yield the error of each family in each precision, of attention, of decoding, and of recomputation."""
    for title, (family, fields) in list(VARIANTS.items())[: setting.pick(None, len(FAMILIES))]:
        config = small_config(family, dropout=0.0, **fields)
        yield from passes(setting, title, config)
        yield decoding(setting, title, config)
    yield from attentions(setting)
    for name in setting.pick(FAMILIES, FAMILIES[:1]):
        yield recomputation(setting, name)


def nats_of(model: ByteModel, config: ModelConfig, ids: Tensor) -> Tensor:
    """Return the nats of the scored positions."""
    nats: Tensor = model(ids, model.empty_memory(len(ids)))[0] if carries_memory(config) else model(ids)
    return nats[:, model.scored(ids.shape[1])]


def passes(setting: Setting, name: str, config: ModelConfig) -> Iterator[Row]:
    """Yield the error of the nats and of the gradient of all parameters."""
    torch.manual_seed(0)
    model = build_model(config).eval()
    ids = random_ids(config, 3)
    exact = nats_of(model, config, ids)
    exact.sum().backward()
    gradient = _gradient(model)
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}

    def errors(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
        own = build_model(config).eval()
        own.load_state_dict(state)
        own.to(device, dtype)
        nats = nats_of(own, config, ids.to(device))
        nats.sum().backward()
        return {"nats": distance(nats, exact), "gradient": distance(_gradient(own), gradient)}

    for dtype in PRECISIONS:
        bounds = errors(CPU, dtype) if dtype == torch.bfloat16 else {}
        for what, error in errors(setting.device, dtype).items():
            yield compared(f"{name}, {dtype}: {what}", error, bounds.get(what))


def compared(title: str, error: float, of_cpu: float | None, where: str = "") -> Row:
    """Return the row of an error. `of_cpu` is the error of the CPU in bf16; None for an error in fp32."""
    bound = max(TOLERANCE, BF16_FACTOR * (of_cpu or 0.0))
    detail = f"{where}at most {bound:.2g}" + ("" if of_cpu is None else f"; a CPU has {of_cpu:.2g}")
    return Row(title, error, "", detail, error <= bound)


def _gradient(model: ByteModel) -> Tensor:
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


def distance(own: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference divided by the norm of the exact value."""
    own, exact = own.detach().float().cpu(), exact.detach().float().cpu()
    return float((own - exact).norm() / exact.norm())


@torch.no_grad()
def decoding(setting: Setting, name: str, config: ModelConfig) -> Row:
    """Return the error of cached decoding against the forward pass, both on the device in fp32."""
    torch.manual_seed(0)
    model = build_model(config).eval().to(setting.device)
    ids = random_ids(config, 2).to(setting.device)
    scored = model.scored(ids.shape[1])
    first = scored.start or 0
    decoder = model.decoder(len(ids))
    steps = (decoder.step(ids[:, place]) for place in range(first, ids.shape[1] - 1))
    logits = [decoder.prime(ids[:, :first]), *steps]
    decoded = F.cross_entropy(torch.stack(logits, 2).float(), ids[:, first:], reduction="none")
    error = distance(decoded, nats_of(model, config, ids))
    return Row(f"{name}, fp32: cached decoding", error, "", "at most 0.0001", error <= TOLERANCE)


def attentions(setting: Setting) -> Iterator[Row]:
    """Yield the largest error of each kind of attention over lengths and channels, with gradients."""
    kinds: dict[str, Attention] = {
        "causal": lambda q, k, v: causal_attention(q, k, v, 0.0),
        "masked": lambda q, k, v: attention(q, k, v, _mask(q.shape[2], q.device)),
        "window": lambda q, k, v: window_attention(q, k, v, 16, 0.0),
    }
    lengths, channels = setting.pick((LENGTHS, CHANNELS), (LENGTHS[:4], CHANNELS[:1]))
    for name, kind in kinds.items():
        for dtype in PRECISIONS:
            worst, where, of_cpu = 0.0, "", None
            for length in lengths:
                for width in channels:
                    error = _attention_error(setting.device, kind, length, width, dtype)
                    if error >= worst:
                        worst, where = error, f"worst at {length} positions, {width} channels; "
                        of_cpu = _attention_error(CPU, kind, length, width, dtype)
            yield compared(f"attention, {name}, {dtype}", worst, None if dtype == torch.float32 else of_cpu, where)


def _mask(length: int, device: torch.device) -> Tensor:
    """Return a causal mask in which each query also misses every fifth key."""
    keys = torch.arange(length, device=device)
    visible = (keys[None] <= keys[:, None]) & (keys[None] % 5 != 3)
    return visible | torch.eye(length, dtype=torch.bool, device=device)


def _attention_error(device: torch.device, kind: Attention, length: int, width: int, dtype: torch.dtype) -> float:
    torch.manual_seed(length)
    values = [torch.randn(2, 3, length, width) for _ in range(3)]
    gradient = torch.randn(2, 3, length, width)
    found = []
    for where, precision in ((CPU, torch.float32), (device, dtype)):
        inputs = [x.to(where, precision).requires_grad_() for x in values]
        out = kind(*inputs)
        found.append([out, *torch.autograd.grad(out, inputs, gradient.to(where, precision))])
    return max(distance(own, exact) for exact, own in zip(*found, strict=True) if exact.norm() > 0)


def recomputation(setting: Setting, name: str) -> Row:
    """Return whether activation checkpointing changes no bit of the losses and of what is trained."""
    config = small_config(name, dropout=0.1)
    trained = []
    for mode in ("none", "full", "selective"):
        engine = engine_of(setting, config, micro_batch=2, activation_checkpointing=mode)
        losses = [
            engine.train_step(batch_of(config, micro_batch=2, seed=step), step=step, learning_rate=1e-3).nats
            for step in range(3)
        ]
        trained.append((losses, [fragment.data.cpu().clone() for fragment in engine.fragments()]))
    (losses, values), *others = trained
    same = all(
        own == losses and all(torch.equal(a, b) for a, b in zip(parts, values, strict=True)) for own, parts in others
    )
    return Row(f"{name}, bf16: activation checkpointing", None, "", "bit for bit, with dropout", same)
