"""Scoring every byte once, and drawing bytes."""

import math

import numpy as np
import pytest
import torch

from data_pipeline.shards import Corpus
from data_pipeline.vocabulary import PADDING, SEPARATOR, VOCABULARY
from pretrain.evaluate import document_windows, evaluate
from pretrain.generate import Sampling, SamplingError, generate, sample
from pretrain.models.megabyte import Megabyte, MegabyteConfig
from tests.data_pipeline.test_prepare import documents_of, files_under


def tiny_model(**changes: object) -> Megabyte:
    torch.manual_seed(0)
    fields = {
        "sequence_length": 32,
        "patch_size": 4,
        "global_model": {"width": 32, "layers": 2, "heads": 2},
        "local_model": {"width": 16, "layers": 2, "heads": 2},
        "initial_std": 0.3,
    }
    return Megabyte(MegabyteConfig.model_validate(fields | changes)).eval()


@pytest.mark.parametrize("length", [1, 32, 700, 5000])
def test_windows_hold_every_document_from_its_beginning(mixed: Corpus, length: int):
    got: dict[str, bytes] = {}
    for window in document_windows(mixed, length):
        assert window.begins_document == (window.key not in got)
        assert 1 <= len(window.ids) <= length
        got[window.key] = got.get(window.key, b"") + window.ids.astype(np.uint8).tobytes()
    assert got == documents_of(mixed) == files_under(mixed.folder.parent / "tree")


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_bits_per_byte_does_not_depend_on_how_windows_are_batched(mixed: Corpus, rows: int):
    model = tiny_model()
    with torch.no_grad():
        result = evaluate(lambda ids: model(torch.from_numpy(ids)), mixed, 32, rows, lambda key: key)
        expected = sum(
            model(torch.from_numpy(window.ids)[None]).double().sum().item() for window in document_windows(mixed, 32)
        )
    assert result.total.bytes == mixed.raw_bytes
    assert result.total.documents == 8
    assert result.total.nats == pytest.approx(expected, rel=1e-6)
    assert result.total.bits_per_byte == pytest.approx(expected / mixed.raw_bytes / math.log(2), rel=1e-6)
    assert result.groups["tree/all"].bytes == 256


def test_a_model_that_knows_nothing_scores_the_logarithm_of_its_vocabulary(mixed: Corpus):
    result = evaluate(lambda ids: torch.full(ids.shape, math.log(256)), mixed, 32, 4)
    assert result.total.bits_per_byte == pytest.approx(8.0, abs=1e-6)


def generated(model: Megabyte, prompt: bytes = b"", count: int = 20, **sampling: object) -> bytes:
    return bytes(generate(model, prompt, count, Sampling(**sampling)))


@pytest.mark.parametrize("prompt", [b"", b"a", b"abcd", bytes(range(200, 231))])
def test_temperature_zero_takes_the_likeliest_byte_of_the_full_forward(prompt: bytes):
    model = tiny_model()
    expected = list(prompt)
    while len(expected) < 31:
        candidates = torch.tensor([[*expected, byte] for byte in range(PADDING)])
        with torch.no_grad():
            expected.append(int(model(candidates)[:, -1].argmin()))
        if expected[-1] == SEPARATOR:
            break
    wanted = [byte for byte in expected[len(prompt) :] if byte != SEPARATOR]
    assert list(generated(model, prompt, count=31 - len(prompt), temperature=0.0)) == wanted if wanted else True


def test_temperature_towards_zero_is_the_likeliest_byte():
    model = tiny_model()
    assert generated(model, b"x", temperature=1e-4) == generated(model, b"x", temperature=0.0)
    assert generated(model, b"x", top_k=1) == generated(model, b"x", temperature=0.0)
    assert generated(model, b"x", top_p=1e-9) == generated(model, b"x", temperature=0.0)


def test_the_same_seed_draws_the_same_bytes():
    model = tiny_model()
    assert generated(model, seed=1) == generated(model, seed=1) != generated(model, seed=2)


def test_draws_follow_the_probabilities_and_the_padding_is_never_drawn():
    logits = torch.full((VOCABULARY,), -20.0)
    logits[[65, 66, 256, PADDING]] = torch.tensor([2.0, 1.0, 0.0, 9.0])
    generator = torch.Generator().manual_seed(0)
    draws = [sample(logits, Sampling(), generator) for _ in range(3000)]
    expected = torch.tensor([2.0, 1.0, 0.0]).softmax(0)
    for value, share in zip((65, 66, 256), expected, strict=True):
        assert draws.count(value) / 3000 == pytest.approx(share.item(), abs=0.03)
    assert logits[PADDING] == 9.0


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        ({"top_k": 2}, {65, 66}),
        ({"top_p": 0.5}, {65}),
        ({"top_p": 0.7}, {65, 66}),
        ({"top_k": 300}, {65, 66, 67}),
    ],
)
def test_top_k_and_top_p_keep_the_likeliest(sampling: dict[str, object], allowed: set[int]):
    logits = torch.full((VOCABULARY,), -50.0)
    logits[[65, 66, 67]] = torch.tensor([0.6, 0.3, 0.1]).log()
    generator = torch.Generator().manual_seed(0)
    assert {sample(logits, Sampling(**sampling), generator) for _ in range(300)} == allowed


def test_it_goes_on_past_the_context_and_takes_prompts_longer_than_it():
    model = tiny_model()
    with torch.no_grad():
        model.local_embedding.weight[SEPARATOR] = 0  # a document without end
    assert len(generated(model, b"start", count=150)) == 150
    long = bytes(range(97, 123)) * 4
    assert generated(model, long, count=5) == generated(model, long[-16:], count=5)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_sampling_is_refused(wrong: dict[str, float]):
    with pytest.raises(SamplingError):
        Sampling(**wrong)
