"""Memory of fully sharded training: the estimate against torch's tracker, on a rank of a fake world.

The tracker sees every tensor of a real step of the engine. It cannot see fused attention on a CPU, so blocks run with
the estimate's stand-in for it.
"""

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType

from pretrain.config.loading import load
from pretrain.engines.config import CheckpointingMode
from pretrain.estimate.activations import (
    GatheredBlocks,
    fused_attention,
    measure_activations,
    on_meta,
)
from pretrain.estimate.states import states_on_rank
from tests.distributed.fake_world import Collectives, fake_engine, fake_world, micro_batches_of
from tests.test_project import ROOT

RANKS = 64
CPU = torch.device("cpu")
GATHERED = (
    _FSDPRefType.UNSHARDED_PARAM,
    _FSDPRefType.UNSHARDED_GRAD,
    _FSDPRefType.ALL_GATHER,
    _FSDPRefType.REDUCE_SCATTER,
)
TOTAL = "Total"


class Peaks(FSDPMemTracker):
    """Tracker of the largest bytes of each kind, of all gathered tensors together, and of everything."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.largest: Counter[str] = Counter()

    def _update_peak_stats(self, state: Any) -> None:
        super()._update_peak_stats(state)
        if held := self._curr_mem_snap.get(CPU):
            for kind, size in (*held.items(), ("gathered", sum(held[kind] for kind in GATHERED))):
                self.largest[kind] = max(self.largest[kind], size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides", "mode"),
    [
        ("megabyte/pg19-best", ("model.global_model.layers=3", "model.local_model.layers=3"), "none"),
        ("megabyte/pg19-best", ("model.global_model.layers=3", "model.local_model.layers=3"), "full"),
        ("transformer/size-6.7b", ("model.layers=3",), "none"),
        ("transformer_xl/enwik8-24-layers", ("model.layers=3",), "none"),
    ],
)
def test_estimate_of_a_sharded_rank_agrees_with_torch_within_10_percent(
    name: str, overrides: tuple[str, ...], mode: CheckpointingMode
):
    sharding = ("engine.name=fsdp", "engine.device=cpu", "engine.precision=bf16", "train.micro_batch=1")
    how = f"engine.activation_checkpointing={mode}"
    config = load(ROOT / f"configs/{name}.yaml", (*overrides, *sharding, how))
    with fake_world(RANKS) as world:
        engine = fake_engine(config, world)
        for block in engine.model.units():
            block.forward = partial(fused_attention, block.forward)
        (optimizer,) = engine._optimizers
        tracker = Peaks(engine.model, optimizer)
        batch = micro_batches_of(config, world)
        with tracker, Collectives():
            engine.train_step(batch, step=0, learning_rate=1e-4)
    largest, model = tracker.largest, on_meta(config.model).bfloat16()
    states = states_on_rank(config.engine, config.optimizer.entry, model, torch.bfloat16, RANKS)
    assert states.weights == 0
    assert states.masters == pytest.approx(largest[_FSDPRefType.SHARDED_PARAM], rel=0.1)
    assert states.gradients == pytest.approx(largest[_FSDPRefType.SHARDED_GRAD], rel=0.1)
    assert states.moments == pytest.approx(largest[_FSDPRefType.OPT], rel=0.1)
    blocks = GatheredBlocks(model)
    numbers = range(len(model.units()))
    gathered = max(count(number) for number in numbers for count in (blocks.in_forward, blocks.at_sum))
    assert gathered == pytest.approx(largest["gathered"], rel=0.1)
    checkpointing = config.engine.activation_checkpointing
    activations = measure_activations(config.model, 1, torch.bfloat16, checkpointing).gathering
    assert sum(states) - states.gradients + activations == pytest.approx(largest[TOTAL], rel=0.1)
