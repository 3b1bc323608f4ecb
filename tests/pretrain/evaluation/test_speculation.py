"""Self-speculation: it changes the number of passes, and no byte."""

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.vocabulary import VOCABULARY
from pretrain.evaluation.generation import Sampling, SamplingError, generate_rows
from pretrain.evaluation.speculation import Speculation, speculate_rows
from pretrain.models import ByteModel, build_model, small_config
from pretrain.models.blocks.multi_byte import MultiByteConfig, MultiByteHeads

HEADS = 5
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("transformer", {}),
    ("transformer", {"window": None, "positions": "learned"}),
    ("transformer", {"attention_across_documents": False}),
    ("transformer", {"attention_across_documents": False, "window": None}),
    ("transformer", {"window": 1}),
    ("mamba", {"attention_across_documents": False}),
    ("megabyte", {"patch_size": 8}),
    ("megabyte", {"patch_size": 8, "attention_across_documents": False, "cross_patch_bytes": 2}),
    ("spacebyte", {}),
    ("spacebyte", {"patches": 3, "window": None}),
    ("transformer_xl", {}),
    ("transformer_xl", {"memory_length": 0}),
]


class Foreseeing(MultiByteHeads):
    """Heads that know the continuation, and draft some of its bytes wrong."""

    def __init__(self, continuation: bytes, wrong: float) -> None:
        super().__init__(MultiByteConfig(heads=HEADS), 1)
        self.continuation, self.wrong = continuation, wrong
        self.drawn = Speculation()
        self.random = random.Random(0)

    def logits(self, states: Tensor) -> Tensor:
        """Return logits of drafts. The last id that was drawn is not read yet, and the heads begin after it."""
        drafts = list(self.continuation[self.drawn.drawn :][: HEADS - 1])
        drafts = [(byte + 1) % 256 if self.random.random() < self.wrong else byte for byte in drafts]
        drafts += [0] * (HEADS - 1 - len(drafts))
        return 100.0 * F.one_hot(torch.tensor(drafts), VOCABULARY)


def build(family: str, **changes: Any) -> ByteModel:
    """Return a model whose bytes differ from each other, in float64."""
    torch.manual_seed(1)
    model = build_model(small_config(family, multi_byte={"heads": HEADS}, **changes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def cases() -> Iterator[Any]:
    """Yield every variant with both ways of drawing; `make test` has one way for each."""
    ways = [Sampling(temperature=0), Sampling(temperature=0.5, top_k=40, seed=3)]
    for number, (family, changes) in enumerate(VARIANTS):
        for place, way in enumerate(ways):
            marks = [pytest.mark.slow] if (number + place) % 2 == 0 else [pytest.mark.long]
            yield pytest.param(family, changes, way, id=f"{family}-{changes}-{way.temperature}", marks=marks)


@pytest.mark.parametrize(("family", "changes", "sampling"), list(cases()))
def test_bytes_are_those_without_speculation_whatever_the_heads_draft(
    family: str, changes: dict[str, Any], sampling: Sampling
):
    """The text is longer than the context."""
    model, count = build(family, sequence_length=16, **changes), 40
    plain = list(generate_rows(model, [b"abc"], [count], sampling, after_separator=True))
    speculated = speculate_rows(model, [b"abc"], [count], sampling, Speculation(), after_separator=True)
    assert list(speculated) == plain
    model.multi_byte = heads = Foreseeing(bytes(byte for _, byte in plain), wrong=0.3)
    drawn = speculate_rows(model, [b"abc"], [count], sampling, heads.drawn, after_separator=True)
    assert list(drawn) == plain
    assert heads.drawn.passes <= heads.drawn.drawn


@pytest.mark.slow
def test_rows_are_those_without_speculation_and_end_at_separators():
    model, sampling = build("transformer"), Sampling(temperature=4.0, seed=3)
    prompts, counts = [b"a longer prompt", b"", b"abc"], [70, 300, 40]
    plain = list(generate_rows(model, prompts, counts, sampling))
    speculated = list(speculate_rows(model, prompts, counts, sampling, Speculation()))
    assert sorted(speculated, key=lambda each: each[0]) == sorted(plain, key=lambda each: each[0])
    assert any(sum(row == number for row, _ in plain) < count for number, count in enumerate(counts))


@pytest.mark.slow
def test_right_drafts_save_all_passes_but_one_in_as_many_as_there_are_heads():
    model = build("transformer", sequence_length=256, window=None)
    how = Sampling(separators=False)
    row = bytes(byte for _, byte in generate_rows(model, [b"ab"], [101], how))
    model.multi_byte = heads = Foreseeing(row, 0.0)
    assert bytes(byte for _, byte in speculate_rows(model, [b"ab"], [101], how, heads.drawn)) == row
    assert heads.drawn.passes == 1 + math.ceil(100 / HEADS)  # the prompt's pass draws a byte


@pytest.mark.slow
def test_trained_heads_save_passes_on_a_text_that_repeats():
    torch.manual_seed(0)
    model = build_model(small_config("transformer", dropout=0.0, initial_std=0.1, multi_byte={"heads": HEADS}))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    text = torch.tensor(list(b"to be or not " * 8))
    for _ in range(60):
        rows = torch.stack([text[start : start + 32] for start in torch.randint(40, (8,)).tolist()])
        optimizer.zero_grad()
        model.train()(rows).mean().backward()
        optimizer.step()
    speculation = Speculation()
    rows = list(speculate_rows(model.eval(), [b"to be or "], [100], Sampling(temperature=0), speculation))
    assert bytes(byte for _, byte in rows) == (b"to be or not " * 10)[9:109]
    assert speculation.passes < 50


def test_models_that_cannot_speculate_are_refused_by_name():
    with pytest.raises(SamplingError, match=r"Transformer has no further heads .* model\.multi_byte trains them"):
        next(speculate_rows(build_model(small_config("transformer")), [b""], [1], Sampling(), Speculation()))
    sparse = {"window": None, "attention": "strided", "attention_stride": 6}
    for family, changes, name in (("transformer", sparse, "Transformer"), ("perceiver_ar", {}, "PerceiverAR")):
        with pytest.raises(SamplingError, match=f"decoder of this {name} cannot take bytes back"):
            next(speculate_rows(build(family, **changes), [b""], [1], Sampling(), Speculation()))
