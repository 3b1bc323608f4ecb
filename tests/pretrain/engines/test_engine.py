"""Laws of the engine: accumulation, determinism, precision, refusal of non-finite gradients."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy

from byteloom.core.packages import MissingPackageError
from byteloom.core.torch_compat import TorchDispatchMode
from data_pipeline.stream.loader import MicroBatch
from data_pipeline.stream.mixture import RowSources
from data_pipeline.vocabulary import PADDING, SEPARATOR
from pretrain.checkpoint import CheckpointError, CheckpointStore, read, verify
from pretrain.distributed.world import ALONE
from pretrain.engines import EngineConfig, EngineError, NonFiniteError, UpdateLimits
from pretrain.engines.blocks import multiply_in_float8
from pretrain.engines.pytorch import PyTorchEngine
from pretrain.models import build_model, model_config
from pretrain.models.blocks.unit import keeps
from pretrain.optim import OPTIMIZERS, OptimizerConfig
from tests.pretrain.models.rows import rows_of

T = 32


STACK = {"width": 32, "layers": 2, "heads": 2}
HNET_STAGE = {"width": 16, "heads": 2, "encoder": "m1", "decoder": "T1", "window": 8}
FAMILIES = {
    "blt": {
        "patches": 12,
        "local_model": {"width": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 2},
        "global_model": STACK,
        "window": 8,
        "ngrams": {"sizes": (3, 4), "buckets": 40},
    },
    "hnet": {
        "stages": [HNET_STAGE | {"patcher": {"name": "learned", "size": 3}, "patches": 20}],
        "main": {"width": 32, "heads": 2, "layers": "T1"},
        "mamba": {"head_width": 16, "state": 8, "chunk": 8},
    },
    "mamba": {"width": 32, "layers": 2, "head_width": 16, "state": 8, "chunk": 8},
    "megabyte": {"patch_size": 4, "global_model": STACK, "local_model": STACK | {"width": 16}, "initial_std": 0.05},
    "perceiver_ar": {"latents": 16, "latent_model": STACK, "cross_heads": 2, "cross_attend_dropout": 0.3},
    "spacebyte": {"patches": 12, "local_model": STACK | {"width": 16}, "global_model": STACK, "window": 8},
    "transformer": STACK | {"window": 8},
    "transformer_xl": STACK | {"memory_length": 8},
}


def make_engine(
    precision: str = "fp32",
    dropout: float = 0.0,
    family: str = "megabyte",
    options: dict[str, object] | None = None,
    changes: dict[str, object] | None = None,
    **optimizer: object,
) -> PyTorchEngine:
    """Build an engine; `options` are fields of EngineConfig, `changes` are fields of the model's config."""
    torch.manual_seed(0)
    tree = {"family": family, "sequence_length": T, "dropout": dropout} | FAMILIES[family] | (changes or {})
    config = EngineConfig.model_validate({"precision": precision, "device": "cpu"} | (options or {}))
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
    whole, parts = make_engine(), make_engine()
    assert train(parts, micro_batch, steps=1) == pytest.approx(train(whole, 8, steps=1), rel=1e-6)
    for a, b in zip(parts.fragments(), whole.fragments(), strict=True):
        if a.name.startswith("exp_avg/"):  # a tenth of the gradient, before Adam's division magnifies rounding
            torch.testing.assert_close(a.data, b.data, rtol=0, atol=1e-5 * b.data.abs().max().item())


def test_loss_is_nats_per_target_byte_and_separators_are_not_bytes():
    engine = make_engine()
    [micro] = batch(8)
    ids = micro.ids
    ids[:, 5], micro.targets[:, 5] = SEPARATOR, True
    ids[:, 7], micro.targets[:, 7] = PADDING, False
    micro = replace(micro, rows=rows_of(ids))
    nats = engine.nats(ids).double().numpy()
    result = engine.train_step([micro], step=0, learning_rate=0.0)
    assert result.nats == pytest.approx(nats[micro.targets].sum(), rel=1e-6)
    assert result.target_bytes == ((ids < SEPARATOR) & micro.targets).sum() < micro.targets.sum()


def test_loss_by_source_is_the_loss_of_its_rows():
    engine, parts = make_engine(), batch(3)
    sources = [np.array([2, 0, 2]), np.array([0, 0, 2]), np.array([0, 2])]  # no row of source 1
    nats, size = np.zeros(3), np.zeros(3, int)
    for part, own in zip(parts, sources, strict=True):
        row_nats = np.where(part.targets, engine.nats(part.ids).double().numpy(), 0).sum(1)
        np.add.at(nats, own, row_nats)
        np.add.at(size, own, ((part.ids < SEPARATOR) & part.targets).sum(1))
    result = engine.train_step(parts, step=0, learning_rate=0.0, sources=RowSources(3, sources))
    assert [target_bytes for _, target_bytes in result.by_source] == size.tolist()
    assert [source_nats for source_nats, _ in result.by_source] == pytest.approx(nats, rel=1e-6)
    assert size.sum() == result.target_bytes
    assert engine.train_step(parts, step=0, learning_rate=0.0) == replace(result, by_source=[])


@pytest.mark.slow
def test_dropout_is_a_function_of_seed_step_and_micro_batch():
    a, b = make_engine(dropout=0.3), make_engine(dropout=0.3)
    torch.manual_seed(99)
    assert train(a, 4) == train(b, 4)
    with_dropout = make_engine(dropout=0.3).train_step(batch(4), step=0, learning_rate=0.0).nats
    assert with_dropout != make_engine(dropout=0.3).train_step(batch(4), step=1, learning_rate=0.0).nats


@pytest.mark.slow
def test_rehearsal_changes_nothing():
    rehearsed, fresh = make_engine(dropout=0.3), make_engine(dropout=0.3)
    rehearsed.rehearse(2)
    assert train(rehearsed, 4) == train(fresh, 4)


def test_scoring_leaves_no_block_gathered():
    engine = make_engine("bf16", options={"name": "fsdp", "reshard_after_forward": False})
    try:
        before = [(fragment.name, fragment.data.clone()) for fragment in engine.fragments()]
        engine.nats(batch(8)[0].ids)
        for (name, values), after in zip(before, engine.fragments(), strict=True):
            assert name == after.name
            torch.testing.assert_close(after.data, values, rtol=0, atol=0, equal_nan=True)
    finally:
        ALONE.leave()


def test_update_that_the_device_decides_equals_the_one_that_the_host_decides():
    """CUDA's way, on a CPU: fused AdamW skips its own update."""
    host, device = make_engine(), make_engine()
    device._selects_on_device = True
    losses = [train(engine, 8) for engine in (host, device)]
    assert losses[0] == losses[1]
    limits = UpdateLimits(gradient_norm=1e-9)
    for engine in (host, device):
        assert not engine.train_step(batch(8), step=3, learning_rate=1e-2, limits=limits).is_updated
    assert train(host, 8) == train(device, 8)
    steps = [float(state["step"]) for engine in (host, device) for state in engine._states().values()]
    assert set(steps) == {6.0}
    for a, b in zip(host.fragments(), device.fragments(), strict=True):
        torch.testing.assert_close(a.data, b.data, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_masters_moments_and_gradients_are_fp32_in_every_precision(precision: str):
    engine = make_engine(precision)
    train(engine, 4, steps=1)
    assert {fragment.data.dtype for fragment in engine.fragments()} == {torch.float32}
    assert engine.nats(batch(8)[0].ids).dtype == torch.float32


@pytest.mark.slow
def test_bf16_losses_are_close_to_fp32():
    exact, rounded = train(make_engine(), 8, steps=8), train(make_engine("bf16"), 8, steps=8)
    assert rounded == pytest.approx(exact, rel=5e-3)
    assert rounded != exact


@pytest.mark.parametrize("mode", ["none", "full"])
def test_bf16_step_equals_one_that_casts_in_each_pass_bit_for_bit(mode: str):
    engine, cast = (make_engine(precision="bf16", options={"activation_checkpointing": mode}) for _ in range(2))
    model = cast.model
    for unit in model.units():
        unit.weights = partial(lambda unit: {name: p.bfloat16() for name, p in unit.named_parameters()}, unit)
    cast._module._weights = lambda: {name: p.bfloat16() for name, p in model.outside_units().items()}
    assert train(engine, 2) == train(cast, 2)
    for a, b in zip(engine.fragments(), cast.fragments(), strict=True):
        assert torch.equal(a.data, b.data), a.name


class Casts(TorchDispatchMode):
    """Mode that lists the sizes of parameters that are cast to bf16."""

    def __init__(self, engine: PyTorchEngine) -> None:
        super().__init__()
        self._parameters = {p.data_ptr() for p in engine.model.parameters()}
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        source = {torch.ops.aten.copy_.default: args[-1], torch.ops.aten._to_copy.default: args[0]}.get(function)
        if source is not None and source.data_ptr() in self._parameters and result.dtype == torch.bfloat16:
            self.sizes.append(source.numel())
        return result


def test_parameters_are_cast_once_a_step_and_for_each_batch_that_is_scored():
    engine = make_engine(precision="bf16")
    once = sorted(p.numel() for p in engine.model.parameters())
    for micro_batch in (1, 2, 8):
        with Casts(engine) as casts:
            engine.train_step(batch(micro_batch), step=0, learning_rate=0.0)
        assert sorted(casts.sizes) == once
    with Casts(engine) as casts:
        engine.nats(batch(8)[0].ids)
    assert sorted(casts.sizes) == once


def test_gradient_is_clipped_to_the_global_norm():
    small, large = make_engine(clip_norm=1e-6, weight_decay=0.0), make_engine(clip_norm=1e6, weight_decay=0.0)
    norms = [e.train_step(batch(8), step=0, learning_rate=1e-3).gradient_norm for e in (small, large)]
    assert norms[0] == norms[1] > 1e-3
    moments = {f.name: f.data for f in small.fragments() if f.name.startswith("exp_avg/")}
    total = torch.cat(list(moments.values())).norm().item()
    assert total == pytest.approx(0.1 * 1e-6, rel=1e-3)  # (1 - beta1) of the clipped gradient


@pytest.mark.parametrize("on_device", [False, True])
def test_non_finite_gradient_changes_nothing_and_names_a_parameter(on_device: bool):
    engine = make_engine()
    engine._selects_on_device = on_device
    with torch.no_grad():
        engine.model.local_pad[0] = float("nan")
    before = [fragment.data.clone() for fragment in engine.fragments()]
    with pytest.raises(NonFiniteError, match="the first "):
        engine.train_step(batch(8), step=0, learning_rate=1e-2)
    for fragment, earlier in zip(engine.fragments(), before, strict=True):
        assert torch.equal(fragment.data.nan_to_num(), earlier.nan_to_num())


CHECKPOINTING: list[object] = ["full", "selective", {"mode": "selective", "every": 2}]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "precision"),
    [
        pytest.param(family, precision, marks=[] if number % 2 == place else pytest.mark.long)
        for number, family in enumerate(FAMILIES)
        for place, precision in enumerate(["fp32", "bf16"])
    ],
)
def test_activation_checkpointing_changes_no_bit(family: str, precision: str):
    """The models have dropout and random crops."""
    plain = make_engine(precision, dropout=0.3, family=family)
    expected = train(plain, 8)
    for mode in CHECKPOINTING:
        again = make_engine(precision, dropout=0.3, family=family, options={"activation_checkpointing": mode})
        assert train(again, 8) == expected, mode
        for a, b in zip(again.fragments(), plain.fragments(), strict=True):
            assert torch.equal(a.data, b.data), (mode, a.name)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "squared_relu", "gelu", "swiglu"])
def test_kept_activations_of_a_block_are_not_overwritten(activation: str):
    """Some activations would write over a kept product."""
    plain, again = (
        make_engine(dropout=0.3, options={"activation_checkpointing": mode}, changes={"activation": activation})
        for mode in ("none", "selective")
    )
    assert train(again, 8) == train(plain, 8)


@pytest.mark.slow
def test_checkpointed_blocks_are_chosen_by_stack_and_number():
    def kept(**checkpointing: object) -> list[str]:
        three = STACK | {"layers": 3}
        engine = make_engine(
            options={"activation_checkpointing": checkpointing}, changes={"global_model": three, "local_model": three}
        )
        return [unit.keeps for units in engine.model.stacks().values() for unit in units]

    assert kept(mode="none") == ["all"] * 6
    assert kept(mode="full") == ["input"] * 6
    assert kept(mode="selective", every=2) == ["products", "all", "products"] * 2
    assert kept(mode="full", every=3, stacks=["local"]) == ["all"] * 3 + ["input", "all", "all"]
    with pytest.raises(EngineError, match="the model has no stack gobal; it has global, local"):
        kept(mode="full", stacks=["gobal"])
    with pytest.raises(EngineError, match="has no stack global; it has blocks"):
        make_engine(family="transformer", options={"activation_checkpointing": {"mode": "full", "stacks": ["global"]}})


def test_selective_checkpointing_keeps_attention_without_dropout():
    """Attention with dropout draws random numbers, in the recomputed pass as well."""
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


def test_float8_is_refused_without_hardware_or_package():
    with pytest.raises(
        EngineError, match=r"needs a CUDA device of compute capability 8\.9 or more, and cpu is not one"
    ):
        make_engine("fp8")
    if importlib.util.find_spec("torchao") is None:
        with pytest.raises(MissingPackageError, match=r"engine\.precision fp8 needs torchao: pip install 'torchao'"):
            multiply_in_float8(make_engine().model)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_each_optimizer_resumes_from_a_checkpoint_bit_for_bit(name: str, tmp_path: Path):
    whole, first, second = (make_engine(dropout=0.3, name=name) for _ in range(3))
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


def test_checkpoint_of_another_optimizer_is_refused(tmp_path: Path):
    folder = CheckpointStore(tmp_path, keep=1).save(0, make_engine().owned_fragments(), {})
    with pytest.raises(CheckpointError, match="belongs to another optimizer: it has no momentum_buffer of parameter "):
        read(verify(folder), make_engine(name="muon").fragments())


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", ["none", "full", "budget"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_blocks_compute_the_same_except_for_rounding(family: str, checkpointing: str):
    options = {"compile": True, "activation_checkpointing": checkpointing}
    plain, compiled = make_engine(family=family), make_engine(family=family, options=options)
    assert train(compiled, 8, steps=1) == pytest.approx(train(plain, 8, steps=1), rel=1e-6)
    for a, b in zip(compiled.fragments(), plain.fragments(), strict=True):
        if a.name.startswith("exp_avg/"):
            torch.testing.assert_close(a.data, b.data, rtol=0, atol=1e-5 * b.data.abs().max().item())


@pytest.mark.slow
def test_memory_freed_by_a_step_is_reused_by_the_next():
    """In a new process with an untouched malloc, the kernel soon hands out almost no page."""
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
    handed_out, pages_of_a_step = map(int, done.stdout.split())
    assert handed_out < pages_of_a_step / 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "name", "on_device"),
    [("adamw", "ddp", False), ("adamw", "ddp", True), ("adamw", "fsdp", True), ("muon", "ddp", False)],
)
def test_batch_above_a_limit_changes_nothing_and_names_its_rows(optimizer: str, name: str, on_device: bool):
    """With `on_device`, a fused optimizer selects by itself, as on a GPU, where the host does not wait."""
    engine, other = (make_engine(options={"name": name}, name=optimizer) for _ in range(2))
    engine._selects_on_device = on_device
    before = [fragment.data.clone() for fragment in engine.fragments()]
    norm = other.train_step(batch(8), step=0, learning_rate=1e-2).gradient_norm
    for limits in (UpdateLimits(gradient_norm=norm / 2), UpdateLimits(nats_per_byte=1.0)):
        result = engine.train_step(batch(8), step=0, learning_rate=1e-2, limits=limits)
        assert not result.is_updated and result.gradient_norm == norm
        assert sum(row.nats for row in result.rows) == pytest.approx(result.nats)
        assert all(torch.equal(f.data, b) for f, b in zip(engine.fragments(), before, strict=True))
        assert engine.counters() == {"optimizer_steps": 0}
    engine.train_step(batch(8), step=0, learning_rate=1e-2, limits=UpdateLimits(10.0, 2 * norm))
    assert all(torch.equal(a.data, b.data) for a, b in zip(engine.fragments(), other.fragments(), strict=True))
