"""Answers of an encoder with a decoder: draws and beam search agree with the forward pass."""

import itertools
from typing import cast

import pytest
import torch
from torch import Tensor

from data_pipeline.vocabulary import PADDING, SEPARATOR
from pretrain.evaluation.answers import answer_rows, beam_search
from pretrain.evaluation.generation import Sampling
from pretrain.models import ByteModel, build_model, small_config

SIZE = {"source_length": 6, "target_length": 4}
SOURCES = [b"abc", b"", b"abcdefghi"]
LETTERS = [97, 98, 99, SEPARATOR]


@pytest.fixture(scope="module")
def model() -> ByteModel:
    """Return a model that writes few letters."""
    torch.manual_seed(1)
    built = build_model(small_config("encoder_decoder", **SIZE)).double().eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.3)
        bias = built.head_weights()[1]
        assert bias is not None
        bias.fill_(-60.0)
        bias[LETTERS] = 0.0
        bias[258] = 90.0  # an id that no answer has
    return built


def log_likelihood(model: ByteModel, source: bytes, ids: list[int]) -> float:
    """Return the mean log-likelihood of the ids of an answer among those that an answer may have."""
    read = torch.tensor([list(source[: SIZE["source_length"]]) or [PADDING]])
    with torch.no_grad():
        logits = _logits(model, read, torch.tensor([ids]))
    return float(logits[0, torch.arange(len(ids)), ids].mean())


def _logits(model: ByteModel, source: Tensor, target: Tensor) -> Tensor:
    states, seen = model.encode(source)  # type: ignore[operator]
    logits = model.logits(model.decode(model.embed(target[:, :-1]), states, seen))  # type: ignore[operator]
    return cast(Tensor, logits[..., : SEPARATOR + 1].log_softmax(-1))


@torch.no_grad()
def test_likeliest_draws_are_those_of_the_forward_pass(model: ByteModel):
    written: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for row, byte in answer_rows(model, SOURCES, [4, 4, 2], Sampling(temperature=0)):
        written[row].append(byte)
    assert len(written[2]) <= 2
    for row, source in enumerate(SOURCES):
        expected: list[int] = []
        while len(expected) < (2 if row == 2 else 4):
            read = torch.tensor([list(source[:6]) or [PADDING]])
            following = int(_logits(model, read, torch.tensor([[*expected, 0]]))[0, -1].argmax())
            if following == SEPARATOR:
                break
            expected.append(following)
        assert written[row] == expected


@torch.no_grad()
def test_beam_search_with_enough_beams_finds_the_best_of_all_answers(model: ByteModel):
    for source in SOURCES:
        answers = [
            [*letters, SEPARATOR] for length in range(4) for letters in itertools.product(LETTERS[:-1], repeat=length)
        ]
        unended = [list(letters) for letters in itertools.product(LETTERS[:-1], repeat=4)]
        best = max([*answers, *unended], key=lambda ids: log_likelihood(model, source, ids))
        found = beam_search(model, source, beams=100, most=4)
        assert list(found) == [id_ for id_ in best if id_ != SEPARATOR]


def test_decoder_refuses_what_does_not_fit(model: ByteModel):
    with pytest.raises(ValueError, match="the decoder has no sources; call encode first"):
        model.decoder(1).prime(torch.empty(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="a source of 7 ids is longer than the model's source length, 6"):
        model(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 7, dtype=torch.long))
    with pytest.raises(ValueError, match="a target of 5 ids is longer than the model's target length, 4"):
        model(torch.zeros(1, 5, dtype=torch.long), torch.zeros(1, 6, dtype=torch.long))
