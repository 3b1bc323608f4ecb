"""Training steps on the fake device.

`python -m tests.pretrain.engines.fake_cuda.steps SHIM` prints findings as JSON. DDP over ranks is left out, because its
C++ code reads values.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tests.pretrain.engines.fake_cuda.loading import load

if __name__ == "__main__":
    load(Path(sys.argv[1]))

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.attention.flex_attention import BlockMask
from torch.testing._internal.distributed.fake_pg import FakeStore

from data_pipeline.stream.loader import MicroBatch
from data_pipeline.stream.mixture import RowSources
from data_pipeline.stream.rows import Rows
from pretrain.conformance.subject import Subject
from pretrain.distributed.world import World
from pretrain.engines import EngineConfig, Upcoming, UpdateLimits, build_engine
from pretrain.models import ByteModel, all_families, build_model, small_config
from pretrain.models.blocks import attention
from pretrain.objectives import show_rows
from pretrain.optim import OptimizerConfig
from tests.pretrain.engines.fake_cuda import device

STEPS, ROWS, MICRO_BATCHES, RANKS = 2, 2, 2, 8
VOTE = (0.0,) * 6
"""What a rank tells the others about its next batch."""

PASSES = {
    "fp32, full": {"precision": "fp32", "activation_checkpointing": "full"},
    "bf16": {"precision": "bf16"},
    "bf16, selective": {"precision": "bf16", "activation_checkpointing": "selective"},
}
IN_BLOCKS = {"sequence_length": 512, "latents": 256, "cross_attend_dropout": 0.0}
"""Perceiver AR whose latents see all inputs before them, by FlexAttention."""
CASES: dict[str, dict[str, Any]] = {
    **{f"{family}, bf16, selective": {"family": family, **PASSES["bf16, selective"]} for family in all_families()},
    **{
        f"{family}, {name}": {"family": family, **passes}
        for family in ("megabyte", "perceiver_ar")
        for name, passes in PASSES.items()
    },
    "fsdp": {"ranks": RANKS, "name": "fsdp"},
    "hsdp": {"ranks": RANKS, "name": "hsdp", "shards": 4},
    "context": {"ranks": RANKS, "name": "fsdp", "context": 2},
    "deterministic": {"deterministic": True},
    "muon": {"optimizer": "muon"},
    "norms by layer": {"ranks": RANKS, "name": "fsdp", "diagnoses": True},
    **{
        f"{kind} attention": {
            "family": "transformer",
            "precision": "bf16",
            "model": {"window": None, "attention": kind, "attention_stride": 8, "attention_across_documents": False},
        }
        for kind in ("strided", "fixed")
    },
    "all inputs in blocks": {"family": "perceiver_ar", "model": IN_BLOCKS},
}
"""Cases by name; arguments of `findings`."""


def findings(
    family: str = "megabyte",
    ranks: int = 1,
    optimizer: str = "adamw",
    precision: str = "bf16",
    model: Mapping[str, Any] = MappingProxyType({}),
    *,
    diagnoses: bool = False,
    **engine: Any,
) -> dict[str, Any]:
    """Return what steps of a small model wait for, and how much they compute where.

    Steps after the first one may measure norms by layer and gradient noise.
    """
    built_model, before = _model(family, model), in_blocks.total()
    config = EngineConfig.model_validate({"device": "cuda", "precision": precision, **engine})
    sizes = {"global_batch": ROWS * MICRO_BATCHES * ranks, "micro_batch": ROWS}
    sources = RowSources(2, [np.zeros(ROWS, np.int64)] * MICRO_BATCHES)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        built = build_engine(config, built_model, OptimizerConfig(name=optimizer), 0, World(0, ranks), **sizes)
        batches = [_micro_batches(family, built_model.sequence_length) for _ in range(STEPS + 1)]
        with device.watched(mode):
            for step, (batch, following) in enumerate(pairwise(batches)):
                built.train_step(
                    batch,
                    step=step,
                    learning_rate=1e-3,
                    sources=sources,
                    limits=UpdateLimits(1e9, 1e9),
                    look_ahead=partial(Upcoming, following, VOTE),
                    diagnose=diagnoses and step > 0,
                )
    return {
        "course": list(device.course),
        "host": sorted(device.host_operations),
        "device operations": device.device_operations.total(),
        "attentions in blocks": in_blocks.total() - before,
    }


in_blocks = Counter[str]()
"""Calls of FlexAttention."""


def _fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_mask: BlockMask) -> torch.Tensor:
    """Take FlexAttention's place, which is compiled: torch's fused kernel keeps the same tensors."""
    in_blocks["calls"] += 1
    return F.scaled_dot_product_attention(q, k, v)


def vote() -> list[str]:
    """Return what a rank waits for when the ranks exchange a few numbers."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, device.watched(mode):
        World(0, RANKS, device=torch.device("cuda", 0)).gather_numbers(1.0, 2.0)
    return list(device.course)


def _model(family: str, changes: Mapping[str, Any]) -> ByteModel:
    with torch.device("meta"):
        model = build_model(small_config(family, **changes))
    for name in filter(lambda name: name.startswith("draw_"), dir(model)):
        setattr(model, name, _with_values(getattr(model, name)))
    return model


def _with_values(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that draws on the host, whose tensors have values."""

    def drawn(*arguments: Any) -> Any:
        with unset_fake_temporarily():
            return draw(*arguments)

    return drawn


def _micro_batches(family: str, length: int) -> list[MicroBatch]:
    """Return micro-batches with separators and padding, as the objective of a family shows them."""
    content, padding = np.zeros((ROWS, length), np.uint8), np.zeros((ROWS, length), bool)
    padding[:, -3:] = True
    rows = Rows(content, np.array([3, length + 5]), padding)
    subject = Subject.of(family)
    show = show_rows(subject.objective, subject.form, 0)
    example = None if show is None else show(rows, np.arange(ROWS))
    targets = ~padding if example is None else example.targets
    return [MicroBatch(index, rows, targets, example=example) for index in range(MICRO_BATCHES)]


if __name__ == "__main__":
    device.install()
    attention._compiled = lambda kernel: _fused
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    print(json.dumps({"vote": vote()} | {name: findings(**case) for name, case in CASES.items()}))
