"""The engine's laws: accumulation, determinism, precision, refusal of broken gradients."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data_pipeline.loader import MicroBatch
from data_pipeline.vocabulary import PADDING, SEPARATOR
from pretrain.engines import EngineConfig, NonFiniteError
from pretrain.engines.pytorch import SingleProcessEngine
from pretrain.models.megabyte import Megabyte, MegabyteConfig
from pretrain.optimizers import OptimizerConfig
from tests.pretrain.rows import rows_of

T = 32


def engine(precision: str = "fp32", dropout: float = 0.0, **optimizer: object) -> SingleProcessEngine:
    torch.manual_seed(0)
    model = Megabyte(
        MegabyteConfig.model_validate(
            {
                "sequence_length": T,
                "patch_size": 4,
                "global_model": {"width": 32, "layers": 2, "heads": 2},
                "local_model": {"width": 16, "layers": 2, "heads": 2},
                "dropout": dropout,
                "initial_std": 0.05,
            }
        )
    )
    config = EngineConfig(precision=precision, device="cpu")
    return SingleProcessEngine(config, model, OptimizerConfig(**optimizer), seed=3)


def batch(micro_batch: int, rows: int = 8, seed: int = 0) -> list[MicroBatch]:
    ids = np.random.default_rng(seed).integers(0, 257, (rows, T)).astype(np.int16)
    targets = np.random.default_rng(seed + 1).random((rows, T)) < 0.7
    parts = [slice(first, first + micro_batch) for first in range(0, rows, micro_batch)]
    return [MicroBatch(index, rows_of(ids[part]), targets[part]) for index, part in enumerate(parts)]


def train(engine: SingleProcessEngine, micro_batch: int, steps: int = 3) -> list[float]:
    return [
        engine.train_step(batch(micro_batch, seed=step), step=step, learning_rate=1e-2).nats for step in range(steps)
    ]


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_accumulation_computes_the_whole_batchs_gradient(micro_batch: int):
    whole, parts = engine(), engine()
    assert train(parts, micro_batch, steps=1) == pytest.approx(train(whole, 8, steps=1), rel=1e-6)
    for a, b in zip(parts.fragments(), whole.fragments(), strict=True):
        if a.name.startswith("exp_avg/"):  # a tenth of the gradient, before Adam's division magnifies rounding
            torch.testing.assert_close(a.data, b.data, rtol=0, atol=1e-5 * b.data.abs().max().item())


def test_the_loss_is_nats_over_target_bytes_and_separators_are_no_bytes():
    it = engine()
    [micro] = batch(8)
    ids = micro.ids
    ids[:, 5], micro.targets[:, 5] = SEPARATOR, True
    ids[:, 7], micro.targets[:, 7] = PADDING, False
    micro = replace(micro, rows=rows_of(ids))
    nats = it.nats(ids).double().numpy()
    result = it.train_step([micro], step=0, learning_rate=0.0)
    assert result.nats == pytest.approx(nats[micro.targets].sum(), rel=1e-6)
    assert result.target_bytes == ((ids < SEPARATOR) & micro.targets).sum() < micro.targets.sum()


def test_dropout_is_a_function_of_seed_step_and_micro_batch():
    a, b = engine(dropout=0.3), engine(dropout=0.3)
    torch.manual_seed(99)
    assert train(a, 4) == train(b, 4)
    with_dropout = engine(dropout=0.3).train_step(batch(4), step=0, learning_rate=0.0).nats
    assert with_dropout != engine(dropout=0.3).train_step(batch(4), step=1, learning_rate=0.0).nats


def test_rehearsal_changes_nothing():
    rehearsed, fresh = engine(dropout=0.3), engine(dropout=0.3)
    rehearsed.rehearse(2)
    assert train(rehearsed, 4) == train(fresh, 4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_masters_moments_and_gradients_are_fp32_whatever_the_precision(precision: str):
    it = engine(precision)
    train(it, 4, steps=1)
    assert {fragment.data.dtype for fragment in it.fragments()} == {torch.float32}
    assert it.nats(batch(8)[0].ids).dtype == torch.float32


def test_bf16_follows_fp32():
    exact, rounded = train(engine(), 8, steps=8), train(engine("bf16"), 8, steps=8)
    assert rounded == pytest.approx(exact, rel=5e-3)
    assert rounded != exact


def test_the_gradient_is_clipped_to_the_global_norm():
    small, large = engine(clip_norm=1e-6, weight_decay=0.0), engine(clip_norm=1e6, weight_decay=0.0)
    norms = [e.train_step(batch(8), step=0, learning_rate=1e-3).gradient_norm for e in (small, large)]
    assert norms[0] == norms[1] > 1e-3
    moments = {f.name: f.data for f in small.fragments() if f.name.startswith("exp_avg/")}
    total = torch.cat(list(moments.values())).norm().item()
    assert total == pytest.approx(0.1 * 1e-6, rel=1e-3)  # (1 - beta1) of the clipped gradient


def test_a_gradient_that_is_not_finite_changes_nothing_and_names_a_parameter():
    it = engine()
    with torch.no_grad():
        it.model.local_pad[0] = float("nan")
    before = [fragment.data.clone() for fragment in it.fragments()]
    with pytest.raises(NonFiniteError, match="the first "):
        it.train_step(batch(4), step=0, learning_rate=1e-2)
    for fragment, earlier in zip(it.fragments(), before, strict=True):
        assert torch.equal(fragment.data.nan_to_num(), earlier.nan_to_num())
