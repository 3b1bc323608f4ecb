"""Byteloom's own families obey every law, in all their variants; and each law finds the fault that it is about."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.conformance import ENGINE_LAWS, LAWS, MODEL_LAWS, BrokenLawError, Law, Subject
from pretrain.engines.registry import ENGINES
from pretrain.models import ByteModel
from pretrain.models.families.transformer import Transformer

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "megabyte": [
        {},
        {"activation": "relu"},
        {"positions": "rotary"},
        {"cross_patch_bytes": 4},
        {"patch_encoder": "convolution", "activation": "swiglu"},
        {"positions": "rotary", "patch_encoder": "convolution", "cross_patch_bytes": 2},
        {"cross_patch_bytes": 4, "activation": "swiglu"},
    ],
    "perceiver_ar": [
        {},
        {"positions": "learned", "activation": "gelu"},
        {"positions": "sinusoidal"},
        {"cross_attend_after": (0,), "input_width": 16},
        {"latents": 32, "cropping": "none"},
        {"rotary_fraction": 1.0, "zero_head": False},
    ],
    "transformer": [
        {},
        {"window": None},
        {"positions": "learned", "activation": "gelu"},
        {"activation": "swiglu"},
        {"window": 1},
    ],
    "transformer_xl": [
        {},
        {"memory_length": 0},
        {"positions": "rotary", "activation": "gelu"},
        {"memory_length": 32, "activation": "swiglu", "feed_forward_width": 48},
    ],
}
CASES = [pytest.param(name, changes, id=f"{name}-{changes}") for name in VARIANTS for changes in VARIANTS[name]]


@pytest.mark.parametrize("law", MODEL_LAWS, ids=str)
@pytest.mark.parametrize(("name", "changes"), CASES)
def test_every_variant_of_a_family_obeys(law: Law, name: str, changes: dict[str, Any], tmp_path: Path):
    law.check(Subject.of(name, **changes), tmp_path)


@pytest.mark.parametrize("law", [law for law in LAWS if law.name in ("activation_checkpointing", "fsdp")], ids=str)
def test_the_laws_of_engines_hold_for_a_family_with_memory(law: Law, tmp_path: Path):
    """tests/distributed has every engine and family, on more ranks."""
    law.check(Subject.of("transformer_xl"), tmp_path)


def test_every_engine_that_needs_no_groups_of_ranks_has_a_law():
    names = {name for name, entry in ENGINES.entries().items() if "shards" not in entry.fields}
    assert names == {law.name for law in ENGINE_LAWS} - {"activation_checkpointing"}


class Peeking(Transformer):
    """Position t sees id t + 1."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + 1e-3 * ids.roll(-1, 1)


class Mixing(Transformer):
    """A row sees the row before it."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + 1e-3 * ids.roll(1, 0)


class Unnormalized(Transformer):
    """Probabilities add up to less than 1."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + 1.0


class Forgetful(Transformer):
    """The decoder uses another output bias than `forward`."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 1.001


class Cheap(Transformer):
    """FLOPs leave out a product."""

    def flops(self, length: int) -> int:
        return super().flops(length) - 2


class Frozen(Transformer):
    """A parameter gets no gradient."""

    def forward(self, ids: Tensor) -> Tensor:
        self.embedding.weight.requires_grad_(False)
        return super().forward(ids)


class Restless(Transformer):
    """First values depend on the process."""

    def first_values(self, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        return torch.rand(shape)


class Skipping(Transformer):
    """The first position of a row is never scored."""

    def scored(self, length: int) -> slice:
        return slice(min(1, length - 1), length)


@pytest.mark.parametrize(
    ("broken", "law", "message"),
    [
        (Peeking, "causality", "byte 1 changes the scores of earlier positions"),
        (Mixing, "causality", "byte 0 of row 0 changes scores of row 1"),
        (Unnormalized, "distribution", "add up to"),
        (Forgetful, "decoder", "after 0 bytes a primed decoder differs from forward"),
        (Cheap, "flops", "torch counts"),
        (Frozen, "gradients", "no gradient reaches embedding.weight"),
        (Restless, "first_values", "differ between two models of one seed"),
        (Skipping, "bytes_scored_once", "of a row of 2 ids range(1, 2) is scored, not range(0, 2)"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_law_names_the_fault_of_a_model_that_breaks_it(
    broken: type[Transformer], law: str, message: str, tmp_path: Path
):
    class Broken(Subject):
        def build(self, dtype: torch.dtype = torch.float32) -> ByteModel:
            model = super().build(dtype)
            model.__class__ = broken
            return model

    [chosen] = [known for known in LAWS if known.name == law]
    with pytest.raises(BrokenLawError, match=re.escape(message)):
        chosen.check(Broken.of("transformer"), tmp_path)
