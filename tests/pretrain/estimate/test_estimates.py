"""What training holds in memory: told on the meta device, and compared with what really is held on a CPU."""

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
    MANY_ROWS,
    activation_line,
    activations_of,
    mean_loss,
    measure_activations,
    measure_kept,
    on_meta,
)
from pretrain.estimate.states import States, shardings
from pretrain.models import ByteModel, ModelConfig, build_model
from tests.test_project import ROOT

# A CPU has no fused attention with dropout, nor with a bias that has a gradient, such as relative positions.
SMALL = [
    ("debug", ("model.dropout=0.0",)),
    ("debug", ("model.dropout=0.0", "model.cross_patch_bytes=4", "model.patch_encoder=convolution")),
    ("debug", ("model.dropout=0.0", "model.local_model.width=128", "model.positions=rotary")),
    ("perceiver_ar/debug", ("model.dropout=0.0", "model.cross_attend_dropout=0.5", "model.cross_attend_after=[1]")),
    ("transformer/debug", ("model.dropout=0.0",)),
    ("transformer_xl/debug", ("model.dropout=0.0", "model.positions=rotary")),
]
small_recipes = pytest.mark.parametrize(("name", "overrides"), SMALL)
ROWS = 4


def model_of(name: str, overrides: tuple[str, ...]) -> ModelConfig:
    return load(ROOT / f"configs/{name}.yaml", overrides).model


def passes_on_cpu(config: ModelConfig) -> tuple[ByteModel, Tensor]:
    torch.manual_seed(0)
    return build_model(config).train(), torch.randint(0, 256, (ROWS, config.sequence_length), dtype=torch.int16)


@small_recipes
def test_what_is_kept_is_what_autograd_saves_on_a_cpu(name: str, overrides: tuple[str, ...]):
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


@small_recipes
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_the_meta_device_holds_what_a_cpu_holds(name: str, overrides: tuple[str, ...], mode: CheckpointingMode):
    config, checkpointing = model_of(name, overrides), CheckpointingConfig(mode=mode)
    model, ids = passes_on_cpu(config)
    recompute(checkpointing, model)
    assert measure_activations(config, ROWS, torch.float32, checkpointing) == activations_of(model, ids)


@small_recipes
def test_the_peak_is_what_the_cpus_allocator_sees_to_a_twentieth(name: str, overrides: tuple[str, ...]):
    """The allocator sees workspaces of kernels as well."""
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


@pytest.mark.parametrize("mode", ["none", "full"])
@small_recipes
def test_the_line_through_measurements_is_the_truth_to_a_fiftieth(
    name: str, overrides: tuple[str, ...], mode: CheckpointingMode
):
    config, checkpointing = model_of(name, overrides), CheckpointingConfig(mode=mode)
    line = activation_line(config, torch.bfloat16, checkpointing)
    for rows in (1, 2, 7, MANY_ROWS):
        truth = measure_activations(config, rows, torch.bfloat16, checkpointing).peak
        assert line.at(rows) == pytest.approx(truth, rel=0.02)
    for rows in (1, 2, 50, 1000):
        assert line.rows_within(line.at(rows) + 1) == rows
        assert line.rows_within(line.at(rows) - 2) == rows - 1


def test_states_are_16_bytes_a_parameter_and_two_for_a_copy_in_bf16():
    model = on_meta(model_of("debug", ()))
    parameters = model.parameter_count()
    (alone,) = shardings(model, torch.float32, gpus=1)
    assert alone.states == States(0, 4 * parameters, 4 * parameters, 8 * parameters)
    (alone,) = shardings(model, torch.bfloat16, gpus=1)
    assert alone.states == States(2 * parameters, 4 * parameters, 4 * parameters, 8 * parameters)


def test_each_sharding_holds_less_than_the_one_before():
    model = on_meta(model_of("megabyte/text", ()))
    by_name = {sharding.name: sharding for sharding in shardings(model, torch.bfloat16, gpus=64)}
    ddp, zero_1, zero_2, zero_3, hsdp = (sharding.bytes for sharding in by_name.values())
    assert ddp > zero_1 > zero_2 > zero_3
    parameters = model.parameter_count()
    assert zero_1 == pytest.approx((2 + 4 + 12 / 64) * parameters, rel=1e-6)
    assert zero_2 == pytest.approx((2 + 16 / 64) * parameters, rel=1e-6)
    block = 12 * 2048**2 + 4 * 2048  # the global model's are the largest
    outside = parameters - 14 * block - 18 * (12 * 1024**2 + 4 * 1024)
    gathered = 2 * (outside + 3 * block)
    assert zero_3 == pytest.approx(18 / 64 * parameters + gathered, rel=1e-6)
    assert hsdp == pytest.approx(18 / 8 * parameters + gathered, rel=1e-6)


def test_the_estimate_command_says_what_fits():
    recipe = str(ROOT / "configs/debug.yaml")
    command = ["models", "estimate", recipe, "--gpus", "16", "--memory", "0.1"]
    lines = CliRunner().invoke(app, command, catch_exceptions=False).stdout.splitlines()
    assert lines[0].startswith(("It fits: ", "It does not fit: "))
    assert [line.split()[0] for line in lines if " fits " in line or " too large " in line] == [
        *["ddp", "zero-1", "zero-2", "zero-3,", "hsdp,"] * 2
    ]
    written = json.loads(CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False).stdout)
    config = load(Path(recipe))
    for kind, mode in (("plain", "none"), ("checkpointing", "full")):
        checkpointing = CheckpointingConfig(mode=mode)
        for sharding in written["shardings"].values():
            states = sum(sharding[name] for name in States._fields)
            most = sharding["largest_micro_batch"][kind]
            peak = measure_activations(config.model, most, torch.bfloat16, checkpointing).peak
            assert states + peak <= written["usable_bytes"]
            more = measure_activations(config.model, most + 2, torch.bfloat16, checkpointing).peak
            assert states + more > written["usable_bytes"]
