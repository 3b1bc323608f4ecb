"""Memory of training: estimated on the meta device, and compared with the memory really held on a CPU."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

from pretrain.cli.app import app
from pretrain.config.loading import load
from pretrain.engines import CheckpointingConfig
from pretrain.engines.blocks import recompute
from pretrain.engines.config import CheckpointingMode
from pretrain.estimate.activations import (
    TRAIN_ALL,
    GatheredBlocks,
    activation_lines,
    activations_of,
    mean_loss,
    measure_activations,
    measure_kept,
    on_meta,
)
from pretrain.estimate.states import States, shardings
from pretrain.models import ByteModel, ModelConfig, build_model, small_config
from pretrain.models.finetune import FinetuneConfig
from pretrain.optim import OPTIMIZERS
from tests.test_project import ROOT

# A CPU has no fused attention with dropout, nor with a bias that has a gradient, such as relative positions.
SMALL = [
    ("debug", ("model.dropout=0.0",)),
    ("debug", ("model.dropout=0.0", "model.cross_patch_bytes=4", "model.patch_encoder=convolution")),
    ("debug", ("model.dropout=0.0", "model.local_model.width=128", "model.positions=rotary")),
    ("perceiver_ar/debug", ("model.dropout=0.0", "model.cross_attend_dropout=0.5", "model.cross_attend_after=[1]")),
    ("transformer/debug", ("model.dropout=0.0",)),
    ("debug", ("model.dropout=0.0", "model.attention_across_documents=false", "model.patch_encoder=convolution")),
    (
        "perceiver_ar/debug",
        ("model.dropout=0.0", "model.cross_attend_dropout=0.5", "model.attention_across_documents=false"),
    ),
    ("transformer/debug", ("model.dropout=0.0", "model.attention_across_documents=false")),
    ("transformer_xl/debug", ("model.dropout=0.0", "model.positions=rotary")),
]
small_recipes = pytest.mark.parametrize(("name", "overrides"), SMALL)


def modes(*names: CheckpointingMode) -> pytest.MarkDecorator:
    """Return a mark for every small recipe with every mode; `make test` has one mode of each recipe, in turn."""
    return pytest.mark.parametrize(
        ("name", "overrides", "mode"),
        [
            pytest.param(*recipe, mode, marks=[] if number % len(names) == place else pytest.mark.long)
            for number, recipe in enumerate(SMALL)
            for place, mode in enumerate(names)
        ],
    )


ADAMW = OPTIMIZERS.get("adamw")
ROWS = 4


def model_of(name: str, overrides: tuple[str, ...]) -> ModelConfig:
    return load(ROOT / f"configs/{name}.yaml", overrides).model


def passes_on_cpu(config: ModelConfig) -> tuple[ByteModel, Tensor]:
    torch.manual_seed(0)
    return build_model(config).train(), torch.randint(0, 256, (ROWS, config.sequence_length), dtype=torch.int16)


@pytest.mark.slow
@small_recipes
def test_kept_activations_equal_those_that_autograd_saves_on_a_cpu(name: str, overrides: tuple[str, ...]):
    config = model_of(name, overrides)
    model, ids = passes_on_cpu(config)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = mean_loss(model, ids)
    assert measure_activations(config, ROWS, torch.float32).kept == sum(saved.values()) + loss.nbytes
    assert measure_kept(config, ROWS, torch.float32) == sum(saved.values()) + loss.nbytes


@pytest.mark.slow
@modes("none", "full", "selective")
def test_activations_on_the_meta_device_equal_those_on_a_cpu(
    name: str, overrides: tuple[str, ...], mode: CheckpointingMode
):
    config, checkpointing = model_of(name, overrides), CheckpointingConfig(mode=mode)
    model, ids = passes_on_cpu(config)
    recompute(checkpointing, model)
    assert measure_activations(config, ROWS, torch.float32, checkpointing) == activations_of(model, ids)


@pytest.mark.slow
@small_recipes
def test_estimated_peak_is_within_5_percent_of_the_cpu_allocator(name: str, overrides: tuple[str, ...]):
    """The allocator also counts the workspaces of kernels."""
    config = model_of(name, overrides)
    model, ids = passes_on_cpu(config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        mean_loss(model, ids).backward()
    changes = [
        event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]  # in the order of time
    held = peak = 0
    for change in changes:
        held += change
        peak = max(peak, held)
    assert measure_activations(config, ROWS, torch.float32).peak == pytest.approx(peak, rel=0.05)


@pytest.mark.slow
@modes("none", "full")
def test_interpolated_activations_are_within_2_percent_of_measured_ones(
    name: str, overrides: tuple[str, ...], mode: CheckpointingMode
):
    config, checkpointing = model_of(name, overrides), CheckpointingConfig(mode=mode)
    lines = activation_lines(config, torch.bfloat16, checkpointing)
    line = lines.whole
    for rows in (2, 7):  # 1 and MANY_ROWS are measured by the line itself
        measured = measure_activations(config, rows, torch.bfloat16, checkpointing)
        assert line.at(rows) == pytest.approx(measured.peak, rel=0.02)
        # Small models gather more than they keep, and the peak moves from one block to another with the rows.
        assert lines.gathering.at(rows) == pytest.approx(measured.gathering, rel=0.05)
    for rows in (1, 2, 50, 1000):
        assert line.rows_within(line.at(rows) + 1) == rows
        assert line.rows_within(line.at(rows) - 2) == rows - 1


def test_states_take_16_bytes_per_parameter_and_2_more_for_a_bf16_copy():
    model = on_meta(model_of("debug", ()))
    parameters = model.parameter_count()
    (alone,) = shardings(model, ADAMW, torch.float32, gpus=1)
    assert alone.states == States(0, 4 * parameters, 4 * parameters, 8 * parameters)
    (alone,) = shardings(model, ADAMW, torch.bfloat16, gpus=1)
    assert alone.states == States(2 * parameters, 4 * parameters, 4 * parameters, 8 * parameters)


def test_each_sharding_holds_less_than_the_previous_one():
    model = on_meta(model_of("megabyte/text", ()))
    by_name = {sharding.name: sharding for sharding in shardings(model, ADAMW, torch.bfloat16, gpus=64)}
    ddp, zero_1, zero_2, zero_3, fsdp, hsdp = (sharding.bytes for sharding in by_name.values())
    assert ddp > zero_1 > zero_2 > zero_3 > fsdp
    parameters = model.parameter_count()
    assert zero_1 == pytest.approx((2 + 4 + 12 / 64) * parameters, rel=1e-6)
    assert zero_2 == pytest.approx((2 + 16 / 64) * parameters, rel=1e-6)
    assert zero_3 == pytest.approx(18 / 64 * parameters, rel=1e-6)
    assert fsdp == pytest.approx(16 / 64 * parameters, rel=1e-6)
    assert hsdp == pytest.approx(16 / 8 * parameters, rel=1e-6)
    assert [name for name, sharding in by_name.items() if sharding.gathers] == ["zero-3", "fsdp", "hsdp, 8 x 8"]


def test_frozen_parameters_have_weights_and_masters_and_keep_fewer_activations():
    config = small_config("transformer")
    frozen = FinetuneConfig(freeze=("embedding", "start", "stack.blocks.0"))
    model = on_meta(config, frozen)
    every, trained = model.parameter_count(), sum(each.numel() for each in model.trained_parameters().values())
    (states,) = shardings(model, ADAMW, torch.bfloat16, gpus=1)
    assert states.states == States(weights=2 * every, gradients=4 * trained, masters=4 * every, moments=8 * trained)
    whole, part = (measure_activations(config, 4, torch.float32, finetune=each) for each in (TRAIN_ALL, frozen))
    assert part.kept < whole.kept and part.gathering < whole.gathering


def test_fully_sharded_ranks_hold_whole_gradients_until_the_last_of_several_passes():
    model = on_meta(model_of("megabyte/text", ()))
    one, several = (
        {s.name: s.states.gradients for s in shardings(model, ADAMW, torch.bfloat16, gpus=64, passes=passes)}
        for passes in (1, 3)
    )
    changed = {name for name in one if one[name] != several[name]}
    assert changed == {"fsdp", "hsdp, 8 x 8"}
    assert all(several[name] == 4 * model.parameter_count() for name in changed)


def test_gathered_blocks_are_those_of_the_current_block_and_its_neighbours():
    model = on_meta(model_of("megabyte/text", ())).bfloat16()
    large, small = 12 * 2048**2 + 4 * 2048, 12 * 1024**2 + 4 * 1024  # blocks of the global and of the local model
    outside = model.parameter_count() - 14 * large - 18 * small
    gathered = GatheredBlocks(model)
    assert gathered.in_forward(0) == 2 * (outside + 3 * large)  # the block, its buffer, and the next one's buffer
    assert gathered.in_forward(13) == 2 * (outside + 2 * large + small)
    assert gathered.in_forward(31) == 2 * (outside + 2 * small)
    assert gathered.in_backward(31) == 2 * (outside + 2 * small)
    assert gathered.in_backward(13) == 2 * (outside + 2 * large) + 4 * small  # a sum of gradients is in fp32
    assert gathered.at_sum(14) == 2 * (outside + 2 * small + large) + 4 * small
    assert gathered.at_sum(0) == 2 * (outside + 2 * large) + 4 * large


def test_muon_keeps_4_bytes_of_moments_for_a_matrix_and_runs_under_engines_of_whole_or_gathered_matrices():
    model = on_meta(model_of("megabyte/text", ()))
    by_name = {s.name: s.states for s in shardings(model, OPTIMIZERS.get("muon"), torch.bfloat16, gpus=8)}
    assert list(by_name) == ["ddp", "fsdp"]
    matrices = 14 * 12 * 2048**2 + 18 * 12 * 1024**2
    moments = 4 * matrices + 8 * (model.parameter_count() - matrices)
    assert [states.moments for states in by_name.values()] == [moments, moments // 8]


@pytest.mark.slow
def test_estimate_command_shows_what_fits():
    recipe = str(ROOT / "configs/debug.yaml")
    command = ["models", "estimate", recipe, "--gpus", "16", "--memory", "0.1"]
    lines = CliRunner().invoke(app, command, catch_exceptions=False).stdout.splitlines()
    assert lines[0].startswith(("It fits: ", "It does not fit: "))
    assert [line.split()[0] for line in lines if " fits " in line or " too large " in line] == [
        *["ddp", "zero-1", "zero-2", "zero-3", "fsdp", "hsdp,"] * 2
    ]
    written = json.loads(CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False).stdout)
    shared = json.loads(CliRunner().invoke(app, [*command, "--json", "--context", "4"]).stdout)
    assert shared["training_flops"] == written["training_flops"] // 4
    config = load(Path(recipe))
    for kind, mode in (("plain", "none"), ("checkpointing", "full")):
        checkpointing = CheckpointingConfig(mode=mode)
        for label, sharding in written["shardings"].items():
            which = "gathering" if label.startswith(("zero-3", "fsdp", "hsdp")) else "peak"
            states = sum(sharding[name] for name in States._fields)
            largest = sharding["largest_micro_batch"][kind]
            peak = getattr(measure_activations(config.model, largest, torch.bfloat16, checkpointing), which)
            assert states + peak <= written["usable_bytes"]
            too_many = round(1.05 * largest) + 2
            more = getattr(measure_activations(config.model, too_many, torch.bfloat16, checkpointing), which)
            assert states + more > written["usable_bytes"]


@pytest.mark.parametrize(
    ("recipe", "size", "reason"),
    [("spacebyte/debug", 1, "a full row of this model has patches of 4 to"), ("transformer/debug", 4, "do not follow")],
)
@pytest.mark.slow
def test_sizes_of_patches_that_no_full_row_has_are_refused(recipe: str, size: int, reason: str):
    done = CliRunner().invoke(app, ["models", "estimate", recipe, f"--bytes-per-patch={size}"], env={"COLUMNS": "200"})
    assert done.exit_code == 2 and reason in done.output
