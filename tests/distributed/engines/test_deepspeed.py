"""DeepSpeed engine: the internals of DeepSpeed that it uses, its config from a recipe, and its refusals."""

import re
from typing import Any

import pytest
from pydantic import ValidationError

from pretrain.distributed.world import World
from pretrain.engines import EngineConfig, EngineError
from pretrain.engines.deepspeed import _settings
from tests.distributed.parity import build, model
from tests.distributed.ranks import on_ranks

COMMON_ATTRIBUTES = ("optimizer", "zero_grad", "step")
"""Attributes of all of DeepSpeed's ZeRO optimizers."""
CLASS_ATTRIBUTES = {
    "DeepSpeedZeroOptimizer": (
        "single_partition_of_fp32_groups",
        "averaged_gradients",
        "all_grad_tensors",
        "micro_step_id",
        "_lazy_init_hp_params_optimizer_state",
        "update_lp_params",
        "reset_cpu_buffers",
    ),
    "BF16_Optimizer": (
        "fp32_groups_flat_partition",
        "fp32_groups_gradient_flat_partition",
        "_lazy_init_hp_params_optimizer_state",
        "update_lp_params",
    ),
    "DeepSpeedZeroOptimizer_Stage3": (
        "fp32_partitioned_groups_flat",
        "averaged_gradients",
        "persistent_parameters",
        "_get_fp32_opt_state_partition",
        "_reassign_or_swap_out_partitioned_parameters",
        "_partition_all_parameters",
        "_pre_step",
        "reset_cpu_buffers",
    ),
}
"""Attributes by class of optimizer; BF16_Optimizer is that of zero1 in bf16."""
CLASS_BY_ENGINE = {
    ("zero1", "fp32"): "DeepSpeedZeroOptimizer",
    ("zero1", "bf16"): "BF16_Optimizer",
    ("zero2", "bf16"): "DeepSpeedZeroOptimizer",
    ("zero3", "bf16"): "DeepSpeedZeroOptimizer_Stage3",
}


def inspect_engines(world: World) -> list[dict[str, Any]]:
    """Return facts about the engine of each entry of CLASS_BY_ENGINE, and the bytes that it holds."""
    with pytest.raises(EngineError, match=r"includes engine\.deepspeed.*bucket"):
        build("transformer", world, name="zero2", deepspeed={"zero_optimization": {"reduce_buckets": 1}})
    found = []
    for name, precision in CLASS_BY_ENGINE:
        engine: Any = build("transformer", world, name=name, precision=precision)
        zero = engine._zero
        attributes = COMMON_ATTRIBUTES + CLASS_ATTRIBUTES[type(zero).__name__]
        parameter: Any = next(engine.model.parameters())
        own = "ds_tensor" if name == "zero3" else "_hp_mapping"
        state = [value for flat in engine._masters for value in engine._state[flat].values() if value.dim()]
        found.append(
            {
                "class": type(zero).__name__,
                "missing": [attribute for attribute in attributes if not hasattr(zero, attribute)],
                "of a parameter": hasattr(parameter, own),
                "optimizer": sum(tensor.nbytes for tensor in (*engine._masters, *state)),
                "states": len(engine._state),
                "groups": len(engine._masters),
                "weights": sum((p.ds_tensor if name == "zero3" else p).nbytes for p in engine.model.parameters()),
            }
        )
    return found


@pytest.fixture(scope="module")
def facts_by_rank() -> list[list[dict[str, Any]]]:
    return on_ranks(2, inspect_engines)


def test_used_internals_of_deepspeed_exist(facts_by_rank: list[list[dict[str, Any]]]):
    for found, name in zip(facts_by_rank[0], CLASS_BY_ENGINE.values(), strict=True):
        assert found["class"] == name
        assert not found["missing"]
        assert found["of a parameter"]


@pytest.mark.parametrize("number", range(len(CLASS_BY_ENGINE)), ids=map(" ".join, CLASS_BY_ENGINE))
def test_each_rank_holds_its_share_of_weights_and_states(facts_by_rank: list[list[dict[str, Any]]], number: int):
    (name, precision), ranks = list(CLASS_BY_ENGINE)[number], len(facts_by_rank)
    parameters = build("transformer").model.parameter_count()
    width = {"fp32": 4, "bf16": 2}[precision]
    for facts in facts_by_rank:
        found = facts[number]
        assert found["optimizer"] == pytest.approx(12 * parameters / ranks, rel=0.1)
        assert found["weights"] == pytest.approx(width * parameters / (ranks if name == "zero3" else 1), rel=0.1)
        assert found["states"] == found["groups"]  # moments exist only for flat ranges, not for whole parameters


def test_engine_deepspeed_overrides_the_settings_of_the_recipe():
    more = {"zero_optimization": {"overlap_comm": False}, "wall_clock_breakdown": True}
    config = EngineConfig(name="zero2", precision="bf16", deepspeed=more)
    settings = _settings(config, model("transformer"), micro_batch=2, clip_norm=0.5)
    assert settings["zero_optimization"]["overlap_comm"] is False
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["wall_clock_breakdown"] is True
    assert settings["gradient_clipping"] == 0.5
    assert settings["bf16"]["enabled"]


@pytest.mark.parametrize(
    ("engine", "fault"),
    [
        ({"name": "zero2", "shards": 2}, "engine.shards=2 is for hsdp, not for zero2"),
        *(
            ({"name": f"zero{stage}", "context": 2}, f"engine.context=2 is for ddp, fsdp and hsdp, not for zero{stage}")
            for stage in (1, 2, 3)
        ),
        ({"name": "zero3", "reshard_after_forward": False}, "engine.reshard_after_forward=false is for fsdp and hsdp"),
        ({"name": "zero3", "compile": True}, "engine.compile is not for zero3"),
        ({"name": "ddp", "offload": True}, "engine.offload is not for ddp"),
        (
            {"name": "fsdp", "deepspeed": {"dump_state": True}},
            'engine.deepspeed={"dump_state": true} is for zero1, zero2 and zero3',
        ),
        (
            {"name": "zero1", "deepspeed": {"gradient_clipping": 2}},
            "gradient_clipping, which follows from optimizer.clip_norm",
        ),
        ({"name": "zero1", "deepspeed": {"zero_optimization": {"stage": 3}}}, "stage, which follows from engine.name"),
    ],
)
def test_contradictory_engine_fields_are_refused(engine: dict[str, Any], fault: str):
    with pytest.raises(ValidationError, match=re.escape(fault)):
        EngineConfig.model_validate(engine)


def test_zero_with_one_process_is_refused():
    with pytest.raises(EngineError, match="zero2 needs several ranks, but this run has one"):
        build("transformer", name="zero2")
