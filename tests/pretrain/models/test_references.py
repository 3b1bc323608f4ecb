"""References in plain torch agree with the models whose weights they run."""

import ast
import random
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from data_pipeline.vocabulary import SEPARATOR
from pretrain.models import ByteModel, all_families, build_model, family, model_config
from pretrain.models.references import FOLDER, SHARED, files_of, load_reference
from pretrain.models.references.layers import measure

HNET_STAGE = {"width": 16, "heads": 2, "encoder": "m1", "decoder": "t1", "window": 7, "patches": 15}
SMALL: dict[str, dict[str, Any]] = {
    "blt": {
        "sequence_length": 24,
        "patches": 9,
        "local_model": {"width": 12, "heads": 2, "encoder_layers": 1, "decoder_layers": 2},
        "global_model": {"width": 16, "layers": 2, "heads": 2},
        "window": 7,
        "ngrams": {"sizes": (2, 4), "buckets": 30},
    },
    "hnet": {
        "sequence_length": 24,
        "stages": [HNET_STAGE | {"patcher": {"name": "learned", "size": 3}}],
        "main": {"width": 24, "heads": 2, "layers": "T1"},
        "mamba": {"head_width": 8, "state": 4, "chunk": 7},
    },
    "mamba": {"sequence_length": 24, "width": 16, "layers": 2, "head_width": 8, "state": 4, "chunk": 7},
    "spacebyte": {
        "sequence_length": 24,
        "patches": 9,
        "local_model": {"width": 12, "layers": 3, "heads": 2},
        "global_model": {"width": 16, "layers": 2, "heads": 2},
        "window": 7,
    },
    "transformer": {"sequence_length": 24, "width": 16, "layers": 2, "heads": 2},
    "transformer_xl": {"sequence_length": 12, "memory_length": 7, "width": 16, "layers": 2, "heads": 2},
    "megabyte": {
        "sequence_length": 24,
        "patch_size": 4,
        "global_model": {"width": 16, "layers": 2, "heads": 2},
        "local_model": {"width": 12, "layers": 2, "heads": 3},
    },
    "perceiver_ar": {
        "sequence_length": 24,
        "latents": 10,
        "latent_model": {"width": 16, "layers": 3, "heads": 2},
        "cross_heads": 4,
    },
}
CHANGES: dict[str, list[dict[str, Any]]] = {
    "blt": [
        {},
        {"patcher": {"name": "fixed", "size": 5}, "pooling": "mean", "encoder_attention": "none", "ngrams": None},
        {"patches": 3, "decoder_attention": "none", "attention_across_documents": True, "window": None},
    ],
    "hnet": [
        {},
        {"stages": [HNET_STAGE | {"patcher": {"name": "learned", "size": 3, "smoothing": False}, "encoder": "M1"}]},
        {"stages": [HNET_STAGE | {"patcher": {"name": "byte_class"}, "patches": 5, "window": None}]},
        {
            "stages": [
                HNET_STAGE | {"patcher": {"name": "learned", "size": 3}},
                HNET_STAGE | {"width": 24, "patcher": {"name": "fixed", "size": 2}, "patches": 6},
            ]
        },
        {
            "stages": [
                HNET_STAGE | {"patcher": {"name": "byte_class"}, "join": "multi_linear", "places": 3, "decoder": "T1"},
                HNET_STAGE | {"patcher": {"name": "learned", "size": 2}, "join": "multi_linear", "places": 2},
            ],
            "rotary": {"fraction": 1.0, "base": 500.0},
        },
    ],
    "mamba": [
        {},
        {"attention_across_documents": False, "expansion": 3},
        {"head_width": 16, "state": 6},
    ],
    "spacebyte": [
        {},
        {"patcher": {"name": "fixed", "size": 5}, "positions": "learned", "activation": "gelu"},
        {"patches": 3, "positions": "rotary", "query_key_norm": False, "window": None},
    ],
    "transformer": [
        {},
        {"positions": "learned", "activation": "gelu"},
        {"window": 5, "activation": "swiglu"},
        {"window": 5, "attention_across_documents": False, "activation": "squared_relu"},
        {"attention_across_documents": False, "positions": "learned", "biases": True},
        {"attention": "strided", "attention_stride": 5, "positions": "grid"},
        {"attention": "fixed", "attention_stride": 6, "attention_summary": 2, "attention_groups": 2, "window": None},
        {"attention": "fixed", "attention_stride": 5, "attention_summary": 1, "attention_layers": "interleaved"},
    ],
    "transformer_xl": [
        {},
        {"memory_length": 0, "positions": "rotary"},
        {"positions": "rotary", "activation": "swiglu", "feed_forward_width": 40},
        {"same_length": True, "clamp_length": 3, "activation": "gelu"},
        {"memory_length": 30, "clamp_length": 9},
        {"norm": "post", "scale_embeddings": True, "biases": True, "activation": "gelu_tanh"},
        {"final_norm": False, "memory_length": 5},
    ],
    "megabyte": [
        {},
        {"positions": "rotary", "activation": "gelu"},
        {"cross_patch_bytes": 3, "patch_encoder": "convolution"},
        {"cross_patch_bytes": 4, "positions": "rotary", "attention_across_documents": False, "activation": "swiglu"},
        {"attention_across_documents": False, "patch_encoder": "convolution"},
        {"patch_size": 1, "attention_across_documents": False},
    ],
    "perceiver_ar": [
        {},
        {"positions": "learned", "activation": "gelu", "input_width": 8},
        {"positions": "sinusoidal", "cross_attend_after": [0, 2], "attention_across_documents": False},
        {"positions": "image", "image": [4, 2, 3], "latents": 24, "activation": "relu"},
        {"rotary_fraction": 1.0, "latents": 1, "activation": "swiglu"},
        {"cross_attend_after": [1], "attention_across_documents": False, "latents": 24, "cross_heads": 2},
    ],
}
"""Options of each family that change its forward pass, in several combinations."""
IN_SHAPES = {
    "width",
    "expansion",
    "input_width",
    "query_key_width",
    "widening",
    "feed_forward_width",
    "biases",
    "special_ids",
}
"""Fields that the shapes and names of the weights tell."""
OF_TRAINING = {"multi_byte"}
"""Fields of which only the training reads what they add: a reference predicts the next byte."""


def mixed(name: str, seed: int) -> dict[str, Any]:
    """Return a random combination of the options of a family that is a valid config."""
    choices = random.Random(seed)
    fields = sorted({field for change in CHANGES[name] for field in change})
    while True:
        picked = {field: choices.choice([None, *CHANGES[name]]) for field in fields}
        change = {field: source[field] for field, source in picked.items() if source and field in source}
        with suppress(ValidationError):
            model_config({"family": name, **SMALL[name], **change})
            return change


ENCODERS = ("encoder", "encoder_decoder", "perceiver_io")
"""Families whose references conformance laws compare with the models."""
CASES = [(name, change) for name, changes in CHANGES.items() for change in changes]
MIXED = [(name, mixed(name, seed)) for name in CHANGES for seed in range(20)]


def with_random_weights(name: str, change: dict[str, Any]) -> tuple[ByteModel, Any]:
    """Return a model in float64 whose every parameter matters, and its reference with the same weights."""
    config = model_config({"family": name, **SMALL[name], **change})
    model = build_model(config).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    reference = family(name).reference
    assert reference
    weights = {name: value.detach() for name, value in model.named_parameters()}
    return model, load_reference(reference, config.model_dump(mode="json"), weights)


def some_ids(rows: int, length: int) -> Tensor:
    """Return random bytes with a separator at about every sixth place."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(256, (rows, length), generator=generator)
    return ids.masked_fill(torch.rand(rows, length, generator=generator) < 1 / 6, SEPARATOR)


def nats_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the negative log-likelihood of the last ids of rows under their logits."""
    count = logits.shape[1]
    return F.cross_entropy(logits.transpose(1, 2), ids[:, -count:], reduction="none").float()


@pytest.mark.parametrize(("name", "change"), CASES + MIXED)
@torch.no_grad()
def test_reference_has_the_logits_and_scores_of_its_model(name: str, change: dict[str, Any]):
    model, reference = with_random_weights(name, change)
    ids = some_ids(3, model.sequence_length)
    for length in {1, model.sequence_length // 2 + 1, model.sequence_length}:
        row = ids[:, :length]
        logits = reference.logits(row)
        torch.testing.assert_close(nats_of(logits, row), model(row)[:, model.scored(length)], atol=2e-5, rtol=2e-5)
        expected = model.decoder(3).prime(row[:, :-1])
        torch.testing.assert_close(logits[:, -1], expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("change", CHANGES["transformer_xl"])
@torch.no_grad()
def test_reference_of_transformer_xl_carries_the_memory(change: dict[str, Any]):
    model, reference = with_random_weights("transformer_xl", change)
    memory, own = model.empty_memory(2), reference.empty_memory(2)
    for ids in some_ids(2, 30).split([12, 5, 1, 12], 1):
        nats, memory = model(ids, memory)
        logits, own = reference.segment(ids, own)
        torch.testing.assert_close(nats_of(logits, ids), nats, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", [*SMALL, *ENCODERS])
def test_reference_reads_each_field_that_the_function_depends_on(name: str):
    own = family(name)
    assert own.reference
    text = "".join(files_of(own.reference).values())
    fields = own.config.model_fields.keys() - own.free_fields - {"family"} - IN_SHAPES - OF_TRAINING
    assert [field for field in sorted(fields) if f'"{field}"' not in text] == []


def test_each_family_has_a_reference_that_is_short_and_needs_no_byteloom():
    assert all_families().keys() == {*SMALL, *ENCODERS}
    for own in all_families().values():
        assert own.reference
        files = files_of(own.reference)
        for source in files.values():
            assert len(source.splitlines()) < 150
            imported = {
                (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name) or ""
                for node in ast.walk(ast.parse(source))
                if isinstance(node, ast.Import | ast.ImportFrom)
            }
            allowed = {"torch", "safetensors", *SHARED, *sys.stdlib_module_names}
            assert {name.partition(".")[0] for name in imported} <= allowed
    assert {path.stem for path in FOLDER.glob("*.py")} == {"__init__", *SHARED, *SMALL, *ENCODERS}


@pytest.mark.parametrize(
    ("name", "fault"), [("empty", "is empty; there is no byte to score"), ("none", "No such file")]
)
def test_file_without_a_byte_is_a_line_and_not_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fault: str
):
    (tmp_path / "empty").touch()
    monkeypatch.setattr(sys, "argv", ["model.py", str(tmp_path / name)])
    with pytest.raises(SystemExit, match=f"error: {tmp_path / name}.*{fault}"):
        measure(lambda ids: ids, 8)
