"""Conformance laws: every variant of Byteloom's families obeys them, and each law finds its fault."""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from pretrain.conformance import ENGINE_LAWS, EXAMPLE_LAWS, LAWS, MODEL_LAWS, BrokenLawError, Law, Subject
from pretrain.engines.registry import ENGINES
from pretrain.models import ByteModel
from pretrain.models.families.hnet import HNetConfig
from pretrain.models.families.spacebyte import SpaceByte
from pretrain.models.families.transformer import Transformer
from pretrain.models.patching.patcher import Patcher

HNET_STAGE = {
    "width": 24,
    "heads": 2,
    "encoder": "m1",
    "decoder": "T1",
    "window": 8,
    "patcher": {"name": "learned", "size": 2},
}
AU_NET = {
    "stages": [
        {"patcher": {"name": "byte_class"}, "width": 16, "heads": 2, "encoder": "T1", "decoder": "T1", "window": 8}
        | {"patches": 12, "join": "multi_linear", "places": 3},
        {"patcher": {"name": "fixed", "size": 2}, "width": 16, "heads": 2, "encoder": "T1", "decoder": "T1"}
        | {"patches": 5, "join": "multi_linear", "places": 2},
    ],
    "rotary": {"fraction": 1.0, "base": 500_000.0},
    "initial_std": None,
}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "blt": [
        {},
        {"patcher": {"name": "fixed", "size": 4}, "window": None, "ngrams": None, "encoder_attention": "none"},
        {
            "encoder_attention": "all",
            "decoder_attention": "first",
            "cross_residual": 2,
            "local_model": {"width": 16, "heads": 2, "encoder_layers": 2, "decoder_layers": 2},
            "pooling": "min",
        },
        {"decoder_attention": "none", "ngrams": {"sizes": (2, 5), "buckets": 50, "functions": 2, "normalize": True}},
        {"slots": 1, "activation": "gelu", "rotary_base": 10_000.0, "window": 1, "pooling": "mean"},
        {"slots": 3, "pooling": "none", "decoder_attention": "first"},
        {"attention_across_documents": True, "window": None},
    ],
    "encoder": [
        {},
        {"norm": "post", "positions": "sinusoidal", "scale_embeddings": True},
        {"positions": "rotary", "biases": False, "activation": "swiglu"},
    ],
    "encoder_decoder": [
        {},
        {"norm": "post", "activation": "gelu", "encoder_layers": None},
        {"positions": "rotary", "biases": False, "scale_embeddings": False},
        {"positions": "learned", "activation": "swiglu", "encoder_layers": 2},
    ],
    "hnet": [
        {},
        {
            "stages": [
                HNET_STAGE | {"width": 16, "patches": 24},
                HNET_STAGE | {"encoder": "t1m1", "decoder": "M1", "window": None, "patches": 9},
            ]
        },
        {
            "stages": [
                HNET_STAGE | {"width": 16, "patcher": {"name": "byte_class"}, "patches": 7},
                HNET_STAGE | {"encoder": "", "patcher": {"name": "fixed", "size": 2}, "patches": 3},
            ]
        },
        {
            "stages": [
                HNET_STAGE
                | {
                    "patcher": {"name": "learned", "size": 2, "routing": "linear", "straight_through": False},
                    "patches": 12,
                    "downsampling": "mean",
                },
                HNET_STAGE | {"encoder": "m1", "patches": 6, "downsampling": "max"},
            ]
        },
        AU_NET,
        {"stages": [HNET_STAGE | {"width": 16, "patches": 24, "join": "multi_linear", "places": 1}]},
    ],
    "mamba": [
        {},
        {"attention_across_documents": False, "chunk": 5},
    ],
    "megabyte": [
        {},
        {"activation": "relu"},
        {"positions": "rotary"},
        {"cross_patch_bytes": 4},
        {"patch_encoder": "convolution", "activation": "swiglu"},
        {"positions": "rotary", "patch_encoder": "convolution", "cross_patch_bytes": 2},
        {"cross_patch_bytes": 4, "activation": "swiglu"},
        {"attention_across_documents": False},
        {"attention_across_documents": False, "patch_encoder": "convolution", "cross_patch_bytes": 2},
    ],
    "perceiver_ar": [
        {},
        {"positions": "learned", "activation": "gelu"},
        {"positions": "sinusoidal"},
        {"cross_attend_after": (0,), "input_width": 16},
        {"latents": 32, "cropping": "none"},
        {"rotary_fraction": 1.0, "zero_head": False},
        {"attention_across_documents": False, "cross_attend_after": (0,)},
    ],
    "perceiver_io": [
        {},
        {"cross_attend_every_repeat": True, "repeats": 3, "widening": 2, "activation": "swiglu"},
        {"repeats": 1, "latents": 40},
    ],
    "spacebyte": [
        {},
        {"patcher": {"name": "fixed", "size": 4}, "window": None, "positions": "rotary", "query_key_norm": False},
        {"patches": 3, "positions": "learned", "activation": "swiglu", "parametrization": "fan_in"},
    ],
    "transformer": [
        {},
        {"window": None, "multi_byte": {"heads": 3}},
        {"positions": "learned", "activation": "gelu"},
        {"activation": "swiglu"},
        {"window": 1},
        {"attention_across_documents": False, "window": None, "positions": "learned"},
        {"attention_across_documents": False},
        {"window": None, "attention": "strided", "attention_stride": 6, "positions": "grid"},
        {"window": None, "attention": "fixed", "attention_stride": 8, "attention_summary": 2, "attention_groups": 2},
    ],
    "transformer_xl": [
        {},
        {"memory_length": 0},
        {"positions": "rotary", "activation": "gelu"},
        {"memory_length": 32, "activation": "swiglu", "feed_forward_width": 48},
    ],
}


def cases() -> Iterator[Any]:
    """Yield every variant with every law; `make test` has every law for the first variant, and half for the others."""
    for name, variants in VARIANTS.items():
        for number, changes in enumerate(variants):
            laws = [law for law in (*MODEL_LAWS, *EXAMPLE_LAWS) if law.is_of(Subject.of(name))]
            for place, law in enumerate(laws):
                is_short = number == 0 or (number + place) % 2 == 0
                marks = [] if is_short else [pytest.mark.long]
                yield pytest.param(law, name, changes, id=f"{name}-{changes}-{law}", marks=marks)


@pytest.mark.slow
@pytest.mark.parametrize(("law", "name", "changes"), cases())
def test_every_variant_of_a_family_obeys_the_laws(law: Law, name: str, changes: dict[str, Any], tmp_path: Path):
    law.check(Subject.of(name, **changes), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("law", [law for law in LAWS if law.name in ("activation_checkpointing", "fsdp")], ids=str)
def test_engine_laws_hold_for_a_family_with_memory_and_further_heads(law: Law, tmp_path: Path):
    """tests/distributed covers every engine and family on more ranks."""
    law.check(Subject.of("transformer_xl", multi_byte={"heads": 3}), tmp_path)


@pytest.mark.slow
def test_rates_of_stages_and_ratio_losses_are_the_same_after_a_resume_on_other_ranks(tmp_path: Path):
    """Every stage of an H-Net has its own rate. A checkpoint has no rates: the model declares them at each start."""
    (law,) = (law for law in LAWS if law.name == "fsdp")
    subject = Subject.of("hnet")
    assert isinstance(subject.config, HNetConfig) and len(set(subject.config.multipliers)) == 2
    law.check(subject, tmp_path)


def test_every_engine_without_groups_of_ranks_has_a_law():
    names = {name for name, entry in ENGINES.entries().items() if "shards" not in entry.fields}
    assert names == {law.name for law in ENGINE_LAWS} - {"activation_checkpointing"}


class Peeking(Transformer):
    """Model whose position t depends on id t + 1."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + 1e-3 * ids.roll(-1, 1)


class Mixing(Transformer):
    """Model whose rows depend on the previous row."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + 1e-3 * ids.roll(1, 0)


class Unnormalized(Transformer):
    """Model whose probabilities add up to less than 1."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + 1.0


class Forgetful(Transformer):
    """Model whose decoder differs from `forward`."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 1.001


class Cheap(Transformer):
    """Model whose FLOPs omit a product."""

    def flops(self, length: int) -> int:
        return super().flops(length) - 2


class Crossing(Transformer):
    """Model whose attention does not stop at separators."""

    def visible(self, documents: Tensor, x: Tensor) -> Tensor | BlockMask:
        return super().visible(torch.zeros_like(documents), x)


class Frozen(Transformer):
    """Model with a parameter without gradient."""

    def forward(self, ids: Tensor) -> Tensor:
        self.embedding.weight.requires_grad_(False)
        return super().forward(ids)


class Restless(Transformer):
    """Model whose initial values depend on the process."""

    def first_values(self, name: str, shape: tuple[int, ...], seed: int, **part: int | None) -> Tensor:
        return torch.rand(math.prod(shape))


class Skipping(Transformer):
    """Model that never scores the first position of a row."""

    def scored(self, length: int) -> slice:
        return slice(min(1, length - 1), length)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "law", "message"),
    [
        (Peeking, "causality", "byte 1 changes the scores of earlier positions"),
        (Mixing, "causality", "byte 0 of row 0 changes scores of row 1"),
        (Unnormalized, "distribution", "add up to"),
        (Forgetful, "decoder", "after 0 bytes a primed decoder differs from forward"),
        (Unnormalized, "reference", "the scores of the reference differ from the model's by"),
        (Cheap, "flops", "torch counts"),
        (Crossing, "documents", "bytes before the separator at 1 change the scores after it at"),
        (Frozen, "gradients", "no gradient reaches embedding.weight"),
        (Restless, "first_values", "differ between two models of one seed"),
        (Skipping, "bytes_scored_once", "of a row of 2 ids range(1, 2) is scored, not range(0, 2)"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_law_names_the_fault_of_a_model_that_breaks_it(
    broken: type[Transformer], law: str, message: str, tmp_path: Path
):
    check_fault("transformer", broken, law, message, tmp_path)


def check_fault(family: str, broken: type[ByteModel], law: str, message: str, folder: Path) -> None:
    """Check that a law names the fault of a class that takes the place of a family's."""

    class Broken(Subject):
        def build(self, dtype: torch.dtype = torch.float32) -> ByteModel:
            model = super().build(dtype)
            model.__class__ = broken
            return model

    [chosen] = [known for known in LAWS if known.name == law]
    with pytest.raises(BrokenLawError, match=re.escape(message)):
        chosen.check(Broken.of(family), folder)


class Ahead(SpaceByte):
    """Model whose patches start one byte early."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids.roll(-1, 1))


class Nameless(SpaceByte):
    """Model that does not name its rule."""

    def patchers(self) -> dict[str, Patcher]:
        return {}


class Generous(SpaceByte):
    """Model that counts FLOPs of patches that a row does not have."""

    def useful_flops(self, length: int, patches: Sequence[float]) -> float:
        return super().useful_flops(length, [min(self.patcher.capacity, length)])


class Packed(SpaceByte):
    """Model whose global blocks read the patches that there are."""

    def forward(self, ids: Tensor) -> Tensor:
        patches = int(self.patches(ids[:, :-1]).starts.sum(1).max())
        return super().forward(ids) + 0 * self.patch_outputs(torch.zeros(len(ids), patches, self.widths[0]), 0).sum()


@pytest.mark.parametrize(
    ("broken", "law", "message"),
    [
        (Ahead, "patches", "has other starts of stage 0 at positions"),
        (Nameless, "patches", "names other rules"),
        (Generous, "useful_flops", "useful_flops of [8] patches"),
        (Packed, "activations", "bytes on constant ids"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_laws_of_patches_name_the_fault(broken: type[SpaceByte], law: str, message: str, tmp_path: Path):
    check_fault("spacebyte", broken, law, message, tmp_path)
