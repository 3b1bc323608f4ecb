"""Sums of an evaluation all have the same total of nats."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from data_pipeline.corpus.corpus import Corpus
from pretrain.evaluation.evaluate import evaluate
from pretrain.evaluation.modes import Mode, evaluate_model
from pretrain.evaluation.scores import EvaluationError, Score, in_units
from pretrain.evaluation.words import count_words
from pretrain.models.base import ByteModel
from pretrain.models.families.perceiver_ar import PerceiverAR, PerceiverARConfig
from tests.conftest import prepare_corpus
from tests.data_pipeline.preparation.test_prepare import documents_of
from tests.pretrain.evaluation.test_evaluate_generate import tiny_model, tiny_xl


def tiny_perceiver() -> PerceiverAR:
    torch.manual_seed(0)
    fields = {"latent_model": {"width": 16, "layers": 1, "heads": 2}, "cross_heads": 2, "zero_head": False}
    return PerceiverAR(PerceiverARConfig.model_validate({"sequence_length": 32, "latents": 8} | fields)).eval()


def added(scores: list[Score]) -> Score:
    total = Score()
    for score in scores:
        total.add(score)
    return total


@pytest.fixture
def sound(tmp_path: Path) -> Corpus:
    """Return a corpus of two recordings of 16-bit samples, one with an odd number of windows, and a text."""
    folder = tmp_path / "sound"
    folder.mkdir()
    for name, samples in (("a", 333), ("b", 40)):
        wave = (np.random.default_rng(samples).normal(0, 300, samples)).astype(np.int16)
        soundfile.write(folder / f"{name}.wav", wave, 16_000, "PCM_16")
    (folder / "words.txt").write_text("a text beside them\n")
    return prepare_corpus([folder], tmp_path / "sound-corpus", block_bytes=200)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "mode", "stride"),
    [
        (tiny_model, Mode.windows, None),
        (tiny_model, Mode.windows, 5),
        (tiny_model, Mode.sliding_strided, None),
        (tiny_perceiver, Mode.windows, None),
        (tiny_xl, Mode.memory, None),
    ],
)
@pytest.mark.parametrize("corpus", ["mixed", "sound"])
def test_every_split_of_the_nats_has_the_same_total(
    request: pytest.FixtureRequest, corpus: str, build: Callable[[], ByteModel], mode: Mode, stride: int | None
):
    """The totals are equal to the last bit."""
    read = request.getfixturevalue(corpus)
    result = evaluate_model(build(), read, mode, rows=3, group_of=lambda key: key, stride=stride)
    total = result.total
    assert total.bytes == read.raw_bytes
    for scores in (result.positions.scores(), result.positions.scores(4), result.positions.scores(7)):
        assert (added(scores).units, added(scores).bytes) == (total.units, total.bytes)
        assert added(scores).nats == total.nats
    of_sound = added([score for key, score in result.groups.items() if key.endswith(".wav")])
    by_byte = added(list(result.sample_bytes.values()))
    assert (by_byte.units, by_byte.bytes) == (of_sound.units, of_sound.bytes)
    assert bool(by_byte.bytes) == (corpus == "sound")


def test_a_position_is_the_number_of_bytes_before_it_in_the_window(mixed: Corpus):
    """The loss of each byte is its position in the window."""
    result = evaluate(lambda ids: torch.arange(ids.shape[1]).expand(ids.shape).float(), mixed, 32, rows=3, stride=8)
    scores = result.positions.scores()
    assert len(scores) == 32
    assert all(score.nats == place * score.bytes for place, score in enumerate(scores))
    lengths = [len(raw) for raw in documents_of(mixed).values()]
    assert [score.bytes for score in scores] == [
        sum(place < length for length in lengths)
        if place < 24
        else sum(len(range(place, length, 8)) for length in lengths)
        for place in range(32)
    ]
    in_patch = result.positions.scores(4)
    assert [score.bytes for score in in_patch] == [sum(score.bytes for score in scores[p::4]) for p in range(4)]


@pytest.mark.parametrize("stride", [32, 7])
def test_second_byte_of_a_sample_is_its_high_byte(sound: Corpus, stride: int):
    """The loss of each byte is its value."""
    result = evaluate(lambda ids: torch.from_numpy(ids).float(), sound, 32, rows=3, stride=stride)
    recordings = [raw for key, raw in documents_of(sound).items() if key.endswith(".wav")]
    assert [len(raw) for raw in recordings] == [666, 80] or [len(raw) for raw in recordings] == [80, 666]
    for place, name in enumerate(("low byte", "high byte")):
        score = result.sample_bytes[name]
        assert score.nats == sum(sum(raw[place::2]) for raw in recordings)
        assert score.bytes == 373


def test_word_count_across_blocks_equals_that_of_wc(mixed: Corpus, tmp_path: Path):
    by_document = count_words(mixed, lambda key: key)
    assert by_document == {key: len(raw.split()) for key, raw in documents_of(mixed).items()}
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "long").write_text("word " * 300 + "x" * 1000 + "\n\nlast")
    (folder / "next").write_text("begins at once")
    corpus = prepare_corpus([folder], tmp_path / "texts-corpus", block_bytes=100)
    assert len(corpus) > 10
    assert count_words(corpus, lambda key: "all") == {"all": 302 + 3}


@pytest.mark.parametrize(
    ("bits_per_byte", "size", "words", "perplexity"),
    [
        (0.8751, 41_289_101, 6_965_511, 36.4),
        (0.9079, 41_289_101, 6_965_511, 41.7),
        (0.919, 17_733_002, 3_007_061, 42.8),
    ],
)
def test_e4_word_perplexity_of_pg19_equals_the_papers(bits_per_byte: float, size: int, words: int, perplexity: float):
    """MEGABYTE, tables 3 and 11 (arXiv:2305.07185): test, test in one pass, validation."""
    score = Score(round(bits_per_byte * math.log(2) * size * 2**32), size)
    assert score.word_perplexity(words) == pytest.approx(perplexity, rel=3e-3)
    assert score.word_perplexity(words) == pytest.approx(2 ** (bits_per_byte * size / words), rel=1e-9)


@pytest.mark.parametrize("price", [math.nan, math.inf, -math.inf, 1e9])
def test_a_loss_that_is_not_finite_is_refused(mixed: Corpus, price: float):
    with pytest.raises(ValueError, match="nats for one byte"):
        in_units(np.array([1.0, price], np.float32))
    with pytest.raises(EvaluationError, match=r"loss in tree/.* is not a usable number"):
        evaluate(lambda ids: torch.full(ids.shape, price), mixed, 32, rows=3)
