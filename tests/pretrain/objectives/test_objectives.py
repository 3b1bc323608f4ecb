"""Objectives: an example is a function of row, seed and sequence number, and each objective names its loss."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.errors import CorpusError
from data_pipeline.pairs import joined
from data_pipeline.stream.byte_stream import ByteStream, PackingConfig
from data_pipeline.stream.loader import Loader, LoaderConfig
from data_pipeline.vocabulary import PADDING, SEPARATOR
from pretrain.config.errors import ConfigError
from pretrain.config.loading import load
from pretrain.models import FamilyError, build_model, form_of, small_config
from pretrain.objectives import (
    OBJECTIVES,
    Draws,
    Form,
    ObjectiveConfig,
    Shown,
    Visibility,
    classification,
    conditional,
    prefix,
    show_rows,
    span_corruption,
)
from pretrain.objectives.masked import MASK
from pretrain.objectives.registry import FIRST_SPECIAL_ID
from pretrain.objectives.span_corruption import hidden_and_spans, lengths
from pretrain.terminal.losses import is_loss, unit_of

MASKED = ObjectiveConfig(name="masked")
PAIRS = ObjectiveConfig(name="conditional")
PREFIX = ObjectiveConfig(name="prefix")


def shown(row: np.ndarray, sequence: int = 0, share: float = 0.15) -> Shown:
    """Return a row as the masked objective shows it."""
    objective = ObjectiveConfig(name="masked", share=share)
    show = objective.entry.show
    assert show is not None
    return show(row, Draws(0, sequence), form_of(small_config("encoder"), objective), objective)


def test_draws_are_pinned():
    """Resume and replay rely on it: SHA-256 makes the key, and NumPy guarantees the words of Philox."""
    assert Draws(0, 0).uniform(2).tolist() == pytest.approx([0.721283091431453, 0.05436398752530325], abs=0)
    assert len({Draws(0, sequence).uniform(1)[0] for sequence in range(50)}) == 50


@given(st.integers(1, 40), st.data())
def test_choice_is_of_different_places_in_order(count: int, data: st.DataObject):
    chosen = Draws(1, count).choose(count, data.draw(st.integers(0, count)))
    assert (np.diff(chosen) > 0).all() and ((chosen >= 0) & (chosen < count)).all()


@pytest.mark.parametrize("share", [0.15, 0.5])
def test_masked_hides_a_share_of_the_bytes_and_nothing_else(share: float):
    """Devlin et al. 2019, section 3.1: 15 % of the tokens, of which 80 % are masked and 10 % replaced."""
    row = np.random.default_rng(0).integers(0, 256, 20_000).astype(np.int16)
    row[::100], row[19_000:] = SEPARATOR, PADDING
    example = shown(row, share=share)
    hidden = example.targets
    assert hidden.sum() == round(share * (row < SEPARATOR).sum())
    assert (row[hidden] < SEPARATOR).all()
    assert np.array_equal(example.ids, row)
    read = np.asarray(example.given)
    assert np.array_equal(read[~hidden], row[~hidden])
    masked, same = (read[hidden] == MASK).mean(), (read[hidden] == row[hidden]).mean()
    assert masked == pytest.approx(0.8, abs=0.03)
    assert same == pytest.approx(0.1 + 0.1 / 256, abs=0.03)


def test_masked_predicts_a_byte_of_any_row_that_has_one():
    assert shown(np.array([65, PADDING], np.int16)).targets.tolist() == [True, False]
    assert not shown(np.array([SEPARATOR, PADDING], np.int16)).targets.any()


@given(st.integers(1, 700), st.floats(0.01, 0.9), st.floats(1, 30), st.integers(0, 9))
def test_source_with_the_spans_of_the_target_in_place_of_sentinels_is_the_row(
    length: int, share: float, span: float, sequence: int
):
    objective = ObjectiveConfig(name="span_corruption", share=share, span_length=span)
    row = np.random.default_rng(length).integers(0, 257, length).astype(np.int16)
    form = Form(Visibility.encoder_decoder, *lengths(objective, length))
    example = span_corruption.show(np.append(row, np.int16(PADDING)), Draws(0, sequence), form, objective)
    source, target = np.asarray(example.given), example.ids
    assert len(target) <= form.length and len(source) <= form.source_length
    spans = [list(part[1:]) for part in np.split(target[:-1], np.flatnonzero(target >= FIRST_SPECIAL_ID))[1:]]
    assert all(spans)
    restored = [id_ for each in source for id_ in (spans.pop(0) if each >= FIRST_SPECIAL_ID else [each])]
    assert restored == row.tolist() and not spans
    hidden, number = hidden_and_spans(objective, length)
    assert number <= objective.entry.special_ids(objective, length)
    if length > 1:
        assert target[-1] == SEPARATOR and len(target) == hidden + number + 1
        assert (example.ids[example.ids >= FIRST_SPECIAL_ID] == FIRST_SPECIAL_ID + np.arange(number)).all()


def test_lengths_of_span_corruption_are_those_of_t5():
    """T5's code makes inputs of 512 and targets of 114 ids, each with its end, of 568 tokens in spans of 3."""
    assert lengths(ObjectiveConfig(name="span_corruption", span_length=3), 568) == (114, 511)


def test_prefix_counts_the_rest_of_a_row():
    row = np.array([*range(10), PADDING, PADDING], np.int16)
    form = form_of(small_config("transformer", window=None), PREFIX)
    examples = [prefix.show(row, Draws(0, sequence), form, PREFIX) for sequence in range(60)]
    assert {example.given for example in examples} == set(range(1, 10))
    for example in examples:
        assert isinstance(example.given, int)
        assert np.flatnonzero(example.targets).tolist() == list(range(example.given, 10))


def test_conditional_counts_the_target_and_its_end_alone():
    content = np.frombuffer(joined(b"ab\xff:", b"cd"), np.uint8).astype(np.int16)
    row = np.array([*content, SEPARATOR, PADDING], np.int16)
    encoded = Form(Visibility.encoder_decoder, 7, 28)
    example = conditional.show(row, Draws(0, 0), encoded, PAIRS)
    assert np.asarray(example.given).tolist() == list(b"ab\xff:")
    assert example.ids.tolist() == [*b"cd", SEPARATOR] and example.targets.all()
    example = conditional.show(row, Draws(0, 0), Form(Visibility.causal, len(row), 0), PAIRS)
    assert example.ids.tolist() == [*b"ab\xff:", SEPARATOR, *b"cd", SEPARATOR]
    assert np.flatnonzero(example.targets).tolist() == [5, 6, 7]
    hole = np.full(9, PADDING, np.int16)
    assert not conditional.show(hole, Draws(0, 0), encoded, PAIRS).targets.any()


@pytest.mark.parametrize("family", ["encoder", "perceiver_io"])
def test_classification_hides_the_label_before_the_document(family: str):
    objective = ObjectiveConfig(name="classification")
    form = form_of(small_config(family, sequence_length=12), objective)

    def show(source: bytes, label: bytes) -> Shown:
        row = [*joined(source, label), SEPARATOR, *[PADDING] * 12][: form.length]
        return classification.show(np.array(row, np.int16), Draws(0, 0), form, objective)

    assert is_loss(objective.metric)
    example = show(b"ab:", b"7")
    assert (example.ids.tolist(), example.targets.tolist()) == ([ord("7")], [True])
    assert np.asarray(example.given).tolist() == [MASK, *b"ab:"]
    assert not len(show(b"a document that fills its row", b"7").ids)  # the label is not in the row
    assert not len(classification.show(np.full(9, PADDING, np.int16), Draws(0, 0), form, objective).ids)
    for label in (b"77", b""):
        with pytest.raises(CorpusError, match=r"is not one byte, which objective\.name classification reads"):
            show(b"ab", label)


def test_examples_are_the_same_on_any_number_of_ranks_and_in_any_micro_batch(corpus: Corpus):
    stream = ByteStream(corpus, PackingConfig(), 64, lanes=4, seed=0, bad_blocks=0)
    form = form_of(small_config("encoder", sequence_length=64), MASKED)

    def read(micro_batch: int, ranks: int) -> dict[int, tuple[bytes, ...]]:
        found = {}
        for rank in range(ranks):
            sizes = {"global_batch": 6, "micro_batch": micro_batch, "rank": rank, "world_size": ranks}
            with Loader(stream, LoaderConfig(), **sizes).until(18).showing(show_rows(MASKED, form, 5)) as loader:
                for part in (micro for batch in loader for micro in batch.micro_batches):
                    assert part.example is not None and part.example.given is not None
                    rows = zip(part.ids, part.targets, part.example.given, strict=True)
                    found |= {part.first_sequence + n: tuple(x.tobytes() for x in row) for n, row in enumerate(rows)}
        return found

    alone = read(6, 1)
    assert sorted(alone) == list(range(18))
    assert read(1, 3) == alone and read(4, 2) == alone
    assert len({targets for _, targets, _ in alone.values()}) == 18


def test_losses_of_different_objectives_have_different_names():
    metrics = [entry.metric for entry in OBJECTIVES.entries().values()]
    assert len(set(metrics)) == len(metrics)
    assert all(is_loss(f"validation/books/{metric}") for metric in metrics)
    assert ObjectiveConfig().metric == "bits_per_byte"
    assert unit_of("train/bits_per_masked_byte") == "bits/masked byte"
    assert is_loss("train/bits_per_pixel") and not is_loss("train/bits_per_byte/books")  # another package's unit


def test_objective_that_does_not_train_a_family_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"causal does not train .* family encoder; classification or masked"):
        load("encoder/debug", ["objective.name=causal"])
    with pytest.raises(ConfigError, match=r"objective.name prefix does not train this model of family transformer"):
        load("transformer/debug", ["objective.name=prefix"])  # its window hides a part of the prefix
    with pytest.raises(ConfigError, match=r"reads a pair in each row; set data.packing to document"):
        load("encoder_decoder/base", ["data.packing=concatenate"])
    with pytest.raises(ConfigError, match=r"uses 2 ids beyond the vocabulary .* model.special_ids is 1; set it to 2"):
        load("encoder_decoder/debug", ["model.special_ids=1"])
    with pytest.raises(ConfigError, match=r"makes targets of 41 and sources of 220 ids of rows of 256 ids"):
        load("encoder_decoder/debug", ["model.source_length=219"])
    with pytest.raises(ConfigError, match=r"objective.name masked does not train this model of family megabyte"):
        load("debug", ["objective.name=masked"])
    with pytest.raises(
        ConfigError, match=r"samples.every is 5, and a model of objective.name masked does not generate"
    ):
        load("encoder/debug", ["checkpoint.every=5", "samples.every=5"])
    with pytest.raises(ValidationError, match=r"objective.share is 0.2, and objective.name causal does not use it"):
        ObjectiveConfig(share=0.2)
    with pytest.raises(ConfigError, match="did you mean masked"):
        load("debug", ["objective.name=maskd"])


@pytest.mark.parametrize("family", ["spacebyte", "blt", "hnet", "mamba"])
def test_successors_train_on_pairs_and_refuse_hidden_bytes_by_name(family: str):
    config = small_config(family, **({"attention_across_documents": True} if family == "blt" else {}))
    for name in ("masked", "classification", "prefix", "span_corruption"):
        with pytest.raises(
            FamilyError, match=f"{name} does not train this model of family {family}; .* or conditional"
        ):
            form_of(config, ObjectiveConfig(name=name))
    form = form_of(config, PAIRS)
    assert form.visibility is Visibility.causal
    pair, row = [*joined(b"a source", b"target"), SEPARATOR], np.full(32, PADDING, np.int16)
    row[: len(pair)] = pair
    shown = conditional.show(row, Draws(0, 0), form, PAIRS)
    model = build_model(config)
    nats = model(torch.from_numpy(shown.ids)[None])[0][torch.from_numpy(shown.targets)]
    nats.sum().backward()
    assert len(nats) == len(b"target") + 1
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
