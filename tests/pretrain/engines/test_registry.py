"""Registries of engines and optimizers: undeclared names and options are refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ValidationError
from torch.optim import SGD, Optimizer

from pretrain.config.errors import ConfigError
from pretrain.config.explanation import explain
from pretrain.config.loading import load
from pretrain.config.schema import Config
from pretrain.engines import (
    ENGINES,
    EngineConfig,
    EngineEntry,
    StateSharding,
    optimizer_mismatch,
    register_engine,
    remark_on_idle_ranks,
)
from pretrain.engines.builtin import REPLICATED
from pretrain.engines.pytorch import PyTorchEngine
from pretrain.estimate.activations import on_meta
from pretrain.estimate.states import shardings
from pretrain.models import ByteModel, build_model, model_config
from pretrain.optim import (
    OPTIMIZERS,
    OptimizerConfig,
    OptimizerEntry,
    OptimizerError,
    build_optimizers,
    register_optimizer,
)
from pretrain.optim.groups import with_moments
from tests.test_project import ROOT

DEBUG = ROOT / "configs" / "debug.yaml"
TINY = {"family": "transformer", "sequence_length": 16, "width": 16, "layers": 1, "heads": 2}


class SgdOptions(BaseModel, frozen=True, extra="forbid"):
    """Options of the optimizer of these tests."""

    nesterov: bool = False
    dampening: float = 0.0


def build_sgd(config: OptimizerConfig, model: ByteModel) -> list[Optimizer]:
    """Return SGD with momentum over all parameters."""
    sgd = SGD(model.parameters(), lr=config.learning_rate, momentum=config.momentum, **config.options)
    return [with_moments(sgd, "momentum_buffer")]


@pytest.fixture
def sgd() -> Iterator[str]:
    """Register an optimizer that works on shards, and yield its name."""
    register_optimizer(
        OptimizerEntry(
            "sgd", build_sgd, ("momentum_buffer",), frozenset({"momentum"}), SgdOptions, works_on_shards=True
        )
    )
    yield "sgd"
    OPTIMIZERS.remove("sgd")


@pytest.fixture
def tp() -> Iterator[str]:
    """Register an engine that declares few options, and yield its name."""
    sharding = StateSharding("tp", weights=True, copies_weights=True)
    register_engine(EngineEntry("tp", lambda: PyTorchEngine, sharding, precisions=frozenset({"fp32"})))
    yield "tp"
    ENGINES.remove("tp")


def refusal(*overrides: str) -> str:
    """Return why a recipe is refused."""
    with pytest.raises(ConfigError) as error:
        load(DEBUG, overrides)
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        (
            "engine.name=zero4",
            "engine.name is \"zero4\"; it must be 'ddp', 'fsdp', 'hsdp', 'zero1', 'zero2' or 'zero3'",
        ),
        ("engine.name=fdsp", "(did you mean fsdp?)"),
        ("optimizer.name=adamwx", "it must be 'adamw', 'adam' or 'muon' (did you mean adamw?)"),
        ("optimizer.name=3", "optimizer.name is 3; it must be 'adamw'"),
        ("optimizer.momentum=0.5", "optimizer.momentum is 0.5, and optimizer.name adamw does not use it"),
        ("optimizer.options={beta3: 1}", "optimizer.options has beta3, and optimizer.name adamw has no options"),
        ("engine.options={degree: 2}", "engine.options has degree, and engine.name ddp has no options"),
    ],
)
def test_undeclared_names_are_refused_when_the_recipe_is_read(override: str, text: str):
    assert text in refusal(override)


def test_foreign_optimizer_appears_in_config_help_and_schema(sgd: str):
    config = load(DEBUG, (f"optimizer.name={sgd}", "optimizer.weight_decay=null", "optimizer.options={nesterov: true}"))
    assert config.optimizer.options == {"nesterov": True, "dampening": 0.0}
    assert load_tree(config).optimizer == config.optimizer
    assert explain("optimizer.name").startswith("optimizer.name: adamw | adam | muon | sgd, default")
    assert "sgd" in Config.model_json_schema()["$defs"]["OptimizerConfig"]["properties"]["name"]["enum"]


def load_tree(config: Config) -> Config:
    """Return a config after a round trip through JSON."""
    return Config.model_validate_json(json.dumps(config.as_tree()), strict=True)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["optimizer.options={nestrov: true}"], "optimizer.options.nestrov is not a field of SgdOptions (did you mean"),
        (["optimizer.options={nesterov: 3}"], "optimizer.options.nesterov is 3; it must be true or false"),
        (["optimizer.beta1=0.5"], "optimizer.beta1 is 0.5, and optimizer.name sgd does not use it"),
        (["engine.name=zero1"], "optimizer.name sgd is for engine.name ddp, fsdp and hsdp, not for zero1"),
    ],
)
def test_undeclared_options_of_a_foreign_optimizer_are_refused(sgd: str, overrides: list[str], text: str):
    assert text in refusal(f"optimizer.name={sgd}", "optimizer.weight_decay=null", *overrides)


def test_foreign_optimizer_has_its_moments_in_fragments(sgd: str):
    torch.manual_seed(0)
    config = OptimizerConfig(name=sgd, options={"nesterov": True})
    engine = PyTorchEngine(
        EngineConfig(device="cpu", precision="fp32"), build_model(model_config(TINY)), config, seed=0
    )
    assert {fragment.name.partition("/")[0] for fragment in engine.fragments()} == {"model", "momentum_buffer"}
    assert engine.counters() == {"optimizer_steps": 0}
    engine.restore({"optimizer_steps": 3})


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_moments_equal_those_that_an_optimizer_declares(name: str):
    model = build_model(model_config(TINY))
    states = [
        state for optimizer in build_optimizers(OptimizerConfig(name=name), model) for state in optimizer.state.values()
    ]
    assert {kind for state in states for kind in state} - {"step"} == set(OPTIMIZERS.get(name).moments)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"offload": True}, "engine.offload=true is for fsdp, hsdp, zero1, zero2 and zero3, not for tp"),
        (
            {"precision": "bf16"},
            "precision bf16 is for ddp, fsdp, hsdp, zero1, zero2 and zero3, not for tp; set it to fp32",
        ),
        (
            {"activation_checkpointing": "full"},
            "mode full is for ddp, fsdp, hsdp, zero1, zero2 and zero3, not for tp",
        ),
    ],
)
def test_undeclared_options_of_a_foreign_engine_are_refused(tp: str, fields: dict[str, Any], text: str):
    with pytest.raises(ValidationError, match=text):
        EngineConfig(name=tp, **fields)


def test_foreign_sharding_engine_refuses_optimizers_of_whole_matrices(tp: str):
    mismatch = optimizer_mismatch(EngineConfig(name=tp), OptimizerConfig(name="muon"))
    assert mismatch is not None
    assert (
        "muon works on whole matrices, which engine.name tp shards; it is for ddp, fsdp and hsdp; set one"
        in mismatch.text
    )


def test_foreign_engine_has_a_row_in_the_estimate(tp: str):
    model = on_meta(model_config(TINY))
    rows = {row.name: row.states for row in shardings(model, OPTIMIZERS.get("adamw"), torch.bfloat16, 2)}
    assert list(rows) == ["ddp", "zero-1", "zero-2", "tp", "zero-3", "fsdp"]
    assert rows["tp"].masters == rows[REPLICATED.label].masters


def test_optimizer_without_multipliers_is_refused_for_a_model_that_declares_them(sgd: str):
    model = build_model(model_config(TINY))
    config = OptimizerConfig(name=sgd, weight_decay=None, options={"nesterov": True})
    build_optimizers(config, model)
    model.rate_multiplier = lambda name: 2.0 if "norm" in name else 1.0
    with pytest.raises(OptimizerError, match=r"norm.* has the learning-rate multiplier 2, and optimizer.name sgd"):
        build_optimizers(config, model)


@pytest.mark.slow
def test_recipes_name_only_registered_engines_and_optimizers():
    for path in Path(ROOT / "configs").rglob("*.yaml"):
        text = path.read_text()
        if "\noptimizer:" in text:
            config = load(path)
            assert config.engine.name in ENGINES.names()
            assert config.optimizer.name in OPTIMIZERS.names()


def test_ranks_without_a_row_are_remarked_unless_they_share_rows():
    remark = remark_on_idle_ranks(EngineConfig(name="fsdp"), 48, 1, 1024)
    assert remark is not None
    assert remark.startswith("976 of 1,024 ranks are idle")
    assert remark_on_idle_ranks(EngineConfig(name="fsdp", context=32), 48, 1, 1024) is None
    assert remark_on_idle_ranks(EngineConfig(name="fsdp"), 48, 1, 48) is None


def test_remark_on_idle_ranks_names_only_what_the_engine_supports():
    remarks = [remark_on_idle_ranks(EngineConfig(name=name), 4, 2, 8) for name in ("ddp", "zero1")]
    assert ["engine.context" in (remark or "") for remark in remarks] == [True, False]
    assert all("lower train.micro_batch" in (remark or "") for remark in remarks)
