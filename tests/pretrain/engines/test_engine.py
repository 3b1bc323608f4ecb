"""The engine's laws: accumulation, determinism, precision, refusal of broken gradients."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy

from byteloom.core.packages import MissingPackageError
from data_pipeline.stream.loader import MicroBatch
from data_pipeline.vocabulary import PADDING, SEPARATOR
from pretrain.checkpoint import CheckpointError, CheckpointStore, read, verify
from pretrain.engines import EngineConfig, EngineError, NonFiniteError
from pretrain.engines.blocks import multiply_in_float8
from pretrain.engines.pytorch import PyTorchEngine
from pretrain.models import build_model, model_config
from pretrain.models.blocks.unit import keeps
from pretrain.optim import OPTIMIZERS, OptimizerConfig
from tests.pretrain.models.rows import rows_of

T = 32


STACK = {"width": 32, "layers": 2, "heads": 2}
FAMILIES = {
    "megabyte": {"patch_size": 4, "global_model": STACK, "local_model": STACK | {"width": 16}, "initial_std": 0.05},
    "perceiver_ar": {"latents": 16, "latent_model": STACK, "cross_heads": 2, "cross_attend_dropout": 0.3},
    "transformer": STACK | {"window": 8},
    "transformer_xl": STACK | {"memory_length": 8},
}


def engine(
    precision: str = "fp32",
    dropout: float = 0.0,
    family: str = "megabyte",
    ways: dict[str, object] | None = None,
    changes: dict[str, object] | None = None,
    **optimizer: object,
) -> PyTorchEngine:
    """`ways` are further fields of EngineConfig, `changes` of the model's."""
    torch.manual_seed(0)
    tree = {"family": family, "sequence_length": T, "dropout": dropout} | FAMILIES[family] | (changes or {})
    config = EngineConfig.model_validate({"precision": precision, "device": "cpu"} | (ways or {}))
    model = build_model(model_config(tree))
    return PyTorchEngine(config, model, OptimizerConfig(**optimizer), seed=3, global_batch=8, micro_batch=8)


def batch(micro_batch: int, rows: int = 8, seed: int = 0) -> list[MicroBatch]:
    ids = np.random.default_rng(seed).integers(0, 257, (rows, T)).astype(np.int16)
    targets = np.random.default_rng(seed + 1).random((rows, T)) < 0.7
    parts = [slice(first, first + micro_batch) for first in range(0, rows, micro_batch)]
    return [MicroBatch(index, rows_of(ids[part]), targets[part]) for index, part in enumerate(parts)]


def train(engine: PyTorchEngine, micro_batch: int, steps: int = 3) -> list[float]:
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


CHECKPOINTING: list[object] = ["full", "selective", {"mode": "selective", "every": 2}]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_changes_no_bit(family: str, precision: str):
    """Dropout and random crops included."""
    plain = engine(precision, dropout=0.3, family=family)
    expected = train(plain, 8)
    for how in CHECKPOINTING:
        again = engine(precision, dropout=0.3, family=family, ways={"activation_checkpointing": how})
        assert train(again, 8) == expected, how
        for a, b in zip(again.fragments(), plain.fragments(), strict=True):
            assert torch.equal(a.data, b.data), (how, a.name)


@pytest.mark.parametrize("activation", ["relu", "squared_relu", "gelu", "swiglu"])
def test_what_is_kept_of_a_block_is_what_it_was(activation: str):
    """Also where an activation writes over a product that is kept."""
    plain, again = (
        engine(dropout=0.3, ways={"activation_checkpointing": mode}, changes={"activation": activation})
        for mode in ("none", "selective")
    )
    assert train(again, 8) == train(plain, 8)


def test_blocks_are_chosen_by_stack_and_number():
    def kept(**how: object) -> list[str]:
        three = STACK | {"layers": 3}
        it = engine(ways={"activation_checkpointing": how}, changes={"global_model": three, "local_model": three})
        return [unit.keeps for units in it.model.stacks().values() for unit in units]

    assert kept(mode="none") == ["all"] * 6
    assert kept(mode="full") == ["input"] * 6
    assert kept(mode="selective", every=2) == ["products", "all", "products"] * 2
    assert kept(mode="full", every=3, stacks=["local"]) == ["all"] * 3 + ["input", "all", "all"]
    with pytest.raises(EngineError, match="the model has no stack gobal; it has global, local"):
        kept(mode="full", stacks=["gobal"])
    with pytest.raises(EngineError, match="has no stack global; it has blocks"):
        engine(family="transformer", ways={"activation_checkpointing": {"mode": "full", "stacks": ["global"]}})


def test_selective_checkpointing_keeps_attention_that_draws_nothing():
    """Attention that drops weights takes random numbers, in the recomputed pass as well."""
    q = torch.zeros(1, 1, 2, 8)
    for attention in (
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    ):
        assert keeps(None, attention, q, q, q) == CheckpointPolicy.MUST_SAVE
        assert keeps(None, attention, q, q, q, 0.0, is_causal=True) == CheckpointPolicy.MUST_SAVE
        assert keeps(None, attention, q, q, q, 0.1, is_causal=True) == CheckpointPolicy.PREFER_RECOMPUTE
        assert keeps(None, attention, q, q, q, dropout_p=0.1) == CheckpointPolicy.PREFER_RECOMPUTE
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention.default
    assert keeps(None, efficient, q, q, q, None, True, 0.1) == CheckpointPolicy.PREFER_RECOMPUTE
    assert keeps(None, torch.ops.aten.add.Tensor, q, q) == CheckpointPolicy.PREFER_RECOMPUTE


def test_float8_is_refused_where_it_cannot_be_had():
    with pytest.raises(
        EngineError, match=r"needs a CUDA device of compute capability 8\.9 or more, and cpu is not one"
    ):
        engine("fp8")
    if importlib.util.find_spec("torchao") is None:
        with pytest.raises(MissingPackageError, match=r"engine\.precision fp8 needs torchao: pip install 'torchao'"):
            multiply_in_float8(engine().model)


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_each_optimizer_goes_on_from_a_checkpoint_bit_for_bit(name: str, tmp_path: Path):
    whole, first, second = (engine(dropout=0.3, name=name) for _ in range(3))
    expected = train(whole, 4, steps=4)
    train(first, 4, steps=2)
    store = CheckpointStore(tmp_path, keep=1)
    folder = store.save(2, first.owned_fragments(), {})
    read(verify(folder), second.fragments())
    second.restore(first.counters())
    assert second.counters() == {"optimizer_steps": 2}
    assert [second.train_step(batch(4, seed=step), step=step, learning_rate=1e-2).nats for step in (2, 3)] == expected[
        2:
    ]
    for a, b in zip(second.fragments(), whole.fragments(), strict=True):
        assert torch.equal(a.data, b.data), a.name


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path):
    folder = CheckpointStore(tmp_path, keep=1).save(0, engine().owned_fragments(), {})
    with pytest.raises(CheckpointError, match="belongs to another optimizer: it has no momentum_buffer of parameter "):
        read(verify(folder), engine(name="muon").fragments())


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", ["none", "full", "budget"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_blocks_compute_the_same_up_to_rounding(family: str, checkpointing: str):
    ways = {"compile": True, "activation_checkpointing": checkpointing}
    plain, compiled = engine(family=family), engine(family=family, ways=ways)
    assert train(compiled, 8, steps=1) == pytest.approx(train(plain, 8, steps=1), rel=1e-6)
    for a, b in zip(compiled.fragments(), plain.fragments(), strict=True):
        if a.name.startswith("exp_avg/"):
            torch.testing.assert_close(a.data, b.data, rtol=0, atol=1e-5 * b.data.abs().max().item())


def test_memory_that_a_step_frees_is_there_for_the_next_one():
    """In a process of its own, whose malloc is as it comes: the kernel soon hands out hardly a page."""
    script = """
import resource
import torch
from pretrain.engines.process_state import keep_freed_memory
keep_freed_memory()
faults = []
for _ in range(12):
    tensors = [torch.zeros(n << 20) for n in (1, 4, 7)]
    del tensors
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[-4], (12 << 22) // resource.getpagesize())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    handed_out, of_a_step = map(int, done.stdout.split())
    assert handed_out < of_a_step / 10
