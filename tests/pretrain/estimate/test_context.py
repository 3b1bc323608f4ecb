"""Activations of a rank that shares long rows with others."""

from typing import Any

import pytest
import torch

from pretrain.engines import CheckpointingConfig
from pretrain.estimate.activations import KEEP_ALL, measure_activations
from pretrain.models import model_config

T = 2**18
SMALL = {"width": 32, "layers": 2, "heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "megabyte": {"patch_size": 64, "global_model": SMALL | {"width": 256}, "local_model": SMALL, "dropout": 0.0},
    "transformer": SMALL | {"dropout": 0.0},
    "perceiver_ar": {"latents": 256, "latent_model": SMALL, "cross_heads": 2, "dropout": 0.0},
}


@pytest.mark.parametrize("checkpointing", [KEEP_ALL, CheckpointingConfig(mode="full")], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", MODELS)
def test_activations_of_a_rank_fall_with_the_number_of_ranks(family: str, checkpointing: CheckpointingConfig):
    config = model_config({"family": family, "sequence_length": T} | MODELS[family])
    alone, shared = (measure_activations(config, 1, torch.float32, checkpointing, context).peak for context in (1, 8))
    mask = 4 * MODELS[family].get("latents", 0) * T // 8  # of all latents over a rank's inputs; one process has blocks
    assert 0.95 < 8 * (shared - mask) / alone < 1.25  # the ids and the losses of the whole row are on each rank
