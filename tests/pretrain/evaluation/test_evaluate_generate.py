"""Evaluation scores every byte once. Generation samples bytes."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.vocabulary import PADDING, SEPARATOR, VOCABULARY
from pretrain.evaluation.beginning import Beginning
from pretrain.evaluation.evaluate import evaluate, scorer
from pretrain.evaluation.generation import Sampling, SamplingError, draw, generate_rows, row_generator, sample
from pretrain.evaluation.modes import Mode, evaluate_model, strided
from pretrain.evaluation.scores import EvaluationError
from pretrain.evaluation.windows import document_windows
from pretrain.models.base import ByteModel, Memory
from pretrain.models.families.megabyte import Megabyte, MegabyteConfig
from pretrain.models.families.perceiver_ar import PerceiverAR, PerceiverARConfig
from pretrain.models.families.transformer import Transformer, TransformerConfig
from pretrain.models.families.transformer_xl import TransformerXL, TransformerXLConfig
from tests.data_pipeline.preparation.test_prepare import documents_of, files_under


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
    assert got == documents_of(mixed) == files_under(Path(mixed.location).parent / "tree")


@pytest.mark.slow
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


@pytest.mark.parametrize(("length", "stride"), [(32, 16), (32, 1), (7, 3), (700, 350), (5000, 2500)])
def test_sliding_windows_score_every_byte_once_with_context(mixed: Corpus, length: int, stride: int):
    documents = documents_of(mixed)
    scored: dict[str, bytes] = dict.fromkeys(documents, b"")
    for window in document_windows(mixed, length, stride):
        end = len(scored[window.key])
        assert window.begins_document == (end == 0)
        assert window.context == min(end, length - stride)
        start = end - window.context
        assert window.ids.astype(np.uint8).tobytes() == documents[window.key][start : end + stride]
        scored[window.key] += window.ids[window.context :].astype(np.uint8).tobytes()
    assert scored == documents


@pytest.mark.parametrize(("length", "stride"), [(32, 32), (32, 16), (32, 1), (2, 2), (7, 3), (700, 699), (5000, 5000)])
def test_windows_behind_a_separator_score_every_byte_once_and_the_separator_never(
    mixed: Corpus, length: int, stride: int
):
    documents = documents_of(mixed)
    scored: dict[str, list[int]] = {key: [] for key in documents}
    for window in document_windows(mixed, length, stride, after_separator=True):
        end = len(scored[window.key])
        assert window.begins_document == (end == 0)
        assert len(window.ids) <= length
        whole = [SEPARATOR, *documents[window.key]]
        start = window.offset + 1
        assert window.ids.tolist() == whole[start : start + len(window.ids)]
        assert start + window.context == end + 1
        assert len(window.ids) - window.context in (stride, length - 1, len(documents[window.key]) - end)
        scored[window.key] += window.ids[window.context :].tolist()
    assert {key: bytes(ids) for key, ids in scored.items()} == documents


@pytest.mark.slow
@pytest.mark.parametrize("mode", [Mode.windows, Mode.memory])
def test_evaluation_behind_separators_is_that_of_rows_that_begin_with_them(mixed: Corpus, mode: Mode):
    model, expected = tiny_xl(), 0.0
    with torch.no_grad():
        for raw in documents_of(mixed).values():
            memory: Memory = {}
            for number, segment in enumerate(torch.tensor([[SEPARATOR, *raw]]).split(32, 1)):
                nats, new = model.forward_segment(segment, memory)
                memory = new if mode is Mode.memory else {}
                expected += nats[:, 1 if number == 0 else 0 :].double().sum().item()
    result = evaluate_model(model, mixed, mode, rows=3, after_separator=True).total
    assert (result.bytes, result.documents) == (mixed.raw_bytes, 8)
    assert result.nats == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, "separator"),
        ({"separate_documents": False}, "start"),
        ({"packing": "document"}, "start"),
        ({"mixture": {"a": {"packing": "document"}, "b": {"separate_documents": False}}}, "start"),
        ({"mixture": {"a": {"packing": "document"}, "b": {"separate_documents": True}}}, "separator"),
    ],
)
def test_documents_begin_as_in_training_unless_the_user_says_otherwise(data: dict[str, object], expected: str):
    assert Beginning.auto.resolved(data) == expected
    assert Beginning.start.resolved(data) == "start"
    assert Beginning.separator.resolved(data) == "separator"


@pytest.mark.slow
def test_sliding_evaluation_sums_the_last_half_of_each_window(mixed: Corpus):
    model = tiny_model()
    expected = 0.0
    with torch.no_grad():
        for raw in documents_of(mixed).values():
            ids = torch.tensor(list(raw))
            expected += model(ids[None, :32]).double().sum().item()
            for start in range(16, len(raw) - 16, 16):
                expected += model(ids[None, start : start + 32])[:, 16:].double().sum().item()
    result = evaluate_model(model, mixed, Mode.sliding, rows=3).total
    assert result.bytes == mixed.raw_bytes
    assert result.documents == 8
    assert result.nats == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 4, 5, 6, 7, 8, 17, 31, 32])
def test_a8_strided_inference_takes_first_halves_of_two_passes(length: int):
    """MEGABYTE section 2.3.3. The first patch comes from the first pass."""
    model = tiny_model()
    ids = np.random.default_rng(0).integers(0, 256, (3, length)).astype(np.int16)
    base = scorer(model)(ids)
    got = strided(scorer(model), patch_size=4)(ids)
    assert got.shape == base.shape
    for t in range(length):
        if t % 4 < 2 or t < 4:
            assert torch.equal(got[:, t], base[:, t])
        else:
            shifted = scorer(model)(ids[:, 2:])
            assert torch.equal(got[:, t], shifted[:, t - 2])
            assert not torch.equal(got[:, t], base[:, t])


def test_a8_each_byte_is_scored_once_in_two_passes(mixed: Corpus):
    """With a loss of 1 for every byte, the total is the number of bytes in every mode."""
    for stride in (32, 16):
        ones = strided(lambda ids: torch.ones(ids.shape), patch_size=4)
        result = evaluate(ones, mixed, 32, rows=3, stride=stride).total
        assert result.nats == result.bytes == mixed.raw_bytes


def test_a8_modes_and_strides_that_a_model_does_not_support_are_refused(mixed: Corpus):
    with pytest.raises(EvaluationError, match=r"even model\.patch_size, and this model's is 5"):
        strided(lambda ids: torch.ones(ids.shape), patch_size=5)
    plain = Transformer(TransformerConfig(width=16, layers=1, heads=1, sequence_length=32))
    with pytest.raises(EvaluationError, match=r"does not support mode sliding-strided; it supports windows, sliding$"):
        evaluate_model(plain, mixed, Mode.sliding_strided, rows=3)
    with pytest.raises(EvaluationError, match="does not support mode memory"):
        evaluate_model(plain, mixed, Mode.memory, rows=3)
    with pytest.raises(EvaluationError, match="needs a model that carries memory"):
        evaluate_model(tiny_xl(memory_length=0), mixed, Mode.memory, rows=3)
    with pytest.raises(EvaluationError, match="stride is 33; this model scores at most 32 bytes of a window"):
        evaluate_model(plain, mixed, Mode.windows, rows=3, stride=33)
    with pytest.raises(EvaluationError, match="takes no stride"):
        evaluate_model(tiny_xl(), mixed, Mode.memory, rows=3, stride=16)


def tiny_xl(memory_length: int = 48) -> TransformerXL:
    torch.manual_seed(0)
    config = TransformerXLConfig(
        width=16, layers=2, heads=2, sequence_length=32, memory_length=memory_length, initial_std=0.3
    )
    return TransformerXL(config).eval()


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_memory_spans_a_document_and_ends_with_it(mixed: Corpus, rows: int):
    model = tiny_xl()
    expected = 0.0
    with torch.no_grad():
        for raw in documents_of(mixed).values():
            memory = {}
            for segment in torch.tensor([list(raw)]).split(32, 1):
                nats, memory = model.forward_segment(segment, memory)
                expected += nats.double().sum().item()
    result = evaluate_model(model, mixed, Mode.memory, rows)
    assert result.total.bytes == mixed.raw_bytes
    assert result.total.documents == 8
    assert result.total.nats == pytest.approx(expected, rel=1e-6)
    assert evaluate_model(model, mixed, Mode.windows, rows).total.nats != pytest.approx(expected, rel=1e-4)


def test_a_uniform_model_scores_8_bits_per_byte(mixed: Corpus):
    result = evaluate(lambda ids: torch.full(ids.shape, math.log(256)), mixed, 32, 4)
    assert result.total.bits_per_byte == pytest.approx(8.0, abs=1e-6)


def generated(model: ByteModel, prompt: bytes = b"", count: int = 20, **sampling: object) -> bytes:
    return bytes(byte for _, byte in generate_rows(model, [prompt], [count], Sampling(**sampling)))


def windowed_transformer() -> Transformer:
    torch.manual_seed(0)
    config = TransformerConfig(width=16, layers=2, heads=2, sequence_length=32, window=8, initial_std=0.3)
    return Transformer(config).eval()


def extended_megabyte() -> Megabyte:
    return tiny_model(patch_encoder="convolution", cross_patch_bytes=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "prompt"),
    [
        pytest.param(build, prompt, marks=[] if number == place else pytest.mark.long)
        for number, build in enumerate([extended_megabyte, windowed_transformer, tiny_xl, tiny_model])
        for place, prompt in enumerate([b"", b"a", b"abcd", bytes(range(200, 231))])
    ],
)
def test_temperature_zero_draws_the_likeliest_byte_of_the_full_forward(build: Callable[[], ByteModel], prompt: bytes):
    model = build()
    expected = list(prompt)
    while len(expected) < 31:
        candidates = torch.tensor([[*expected, byte] for byte in range(PADDING)])
        with torch.no_grad():
            expected.append(int(model(candidates)[:, -1].argmin()))
        if expected[-1] == SEPARATOR:
            break
    wanted = [byte for byte in expected[len(prompt) :] if byte != SEPARATOR]
    assert list(generated(model, prompt, count=31 - len(prompt), temperature=0.0)) == wanted if wanted else True


def perceiver_ar() -> PerceiverAR:
    torch.manual_seed(0)
    fields = {"sequence_length": 32, "latents": 32, "latent_model": {"width": 16, "layers": 2, "heads": 2}}
    return PerceiverAR(PerceiverARConfig.model_validate({**fields, "cross_heads": 2, "zero_head": False})).eval()


def few_latents() -> PerceiverAR:
    model = perceiver_ar()
    model.latents = 8
    return model


every_family = pytest.mark.parametrize(
    "build", [tiny_model, extended_megabyte, windowed_transformer, tiny_xl, perceiver_ar]
)


def rows_of(model: ByteModel, prompts: list[bytes], count: int, sampling: Sampling) -> list[bytes]:
    rows = [bytearray() for _ in prompts]
    for row, byte in generate_rows(model, prompts, [count] * len(prompts), sampling):
        rows[row].append(byte)
    return [bytes(row) for row in rows]


def from_the_full_forward(model: ByteModel, prompt: bytes, count: int, sampling: Sampling, row: int) -> bytes:
    """Return the bytes that a row draws alone, without a cache."""
    drawn, generators = list(prompt), [row_generator(sampling.seed, row)]
    for _ in range(count):
        candidates = torch.tensor([[*drawn, id_] for id_ in range(VOCABULARY)])
        with torch.no_grad():
            (id_,) = sample(-model(candidates)[:, -1][None], sampling, generators)
        if id_ == SEPARATOR:
            break
        drawn.append(id_)
    return bytes(drawn[len(prompt) :])


@pytest.mark.slow
@every_family
def test_e5_rows_drawn_together_with_caches_equal_rows_drawn_alone_without_caches(build: Callable[[], ByteModel]):
    model = build()
    prompts = [b"", b"abc", b"xyz", b"a longer prompt", b"abc", b"\x00\xff\x00"]
    sampling = Sampling(temperature=1.3, top_k=200, top_p=0.98, seed=1)
    expected = [from_the_full_forward(model, prompt, 8, sampling, row) for row, prompt in enumerate(prompts)]
    assert rows_of(model, prompts, 8, sampling) == expected
    assert len(set(expected)) == len(expected)


@pytest.mark.slow
@pytest.mark.parametrize("build", [tiny_model, extended_megabyte, windowed_transformer, tiny_xl, few_latents])
def test_row_does_not_depend_on_other_rows_within_and_past_the_context(build: Callable[[], ByteModel]):
    model = build()
    together = rows_of(model, [b"abc", b"def", b"ghi"], 70, Sampling(seed=5))
    assert together[1] == rows_of(model, [b"", b"def"], 70, Sampling(seed=5))[1]
    assert together[2] == rows_of(model, [b"ab", b"", b"ghi", b"jkl"], 70, Sampling(seed=5))[2]
    assert together[:2] == rows_of(model, [b"abc", b"def"], 70, Sampling(seed=5))


@pytest.mark.slow
def test_a_row_ends_with_its_document_and_the_others_continue():
    model, sampling = tiny_model(), Sampling(temperature=4.0, seed=2)
    together = rows_of(model, [b"a"] * 16, 70, sampling)
    ended = [row for row, drawn in enumerate(together) if len(drawn) < 70]
    assert 0 < len(ended) < 16
    for row in ended:
        alone = rows_of(model, [b""] * row + [b"a"], 70, sampling)[row]
        assert together[row] == alone


@pytest.mark.slow
@every_family
def test_prompt_behind_a_separator_is_continued_as_a_row_that_begins_with_it(build: Callable[[], ByteModel]):
    model, sampling = build(), Sampling(temperature=0.0, separators=False)
    drawn = bytes(byte for _, byte in generate_rows(model, [b"abc"], [8], sampling, after_separator=True))
    decoder = model.decoder(1)
    logits = decoder.prime(torch.tensor([[SEPARATOR, *b"abc"]]))
    expected = [int(logits[0, :SEPARATOR].argmax())]
    while len(expected) < 8:
        logits = decoder.step(torch.tensor(expected[-1:]))
        expected.append(int(logits[0, :SEPARATOR].argmax()))
    assert drawn == bytes(expected)


@every_family
def test_a_prompt_is_read_in_one_pass(build: Callable[[], ByteModel]):
    model = build()
    stack = {"stack": "stack.blocks.0", "global_stack": "global_stack.blocks.0"}
    name = next((path for part, path in stack.items() if hasattr(model, part)), "blocks.0")
    calls: list[int] = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: calls.append(1))
    assert len(generated(model, bytes(range(31)), count=1, temperature=0.0)) <= 1
    assert len(calls) == 1


@pytest.mark.slow
def test_temperature_near_zero_draws_the_likeliest_byte():
    model = tiny_model()
    for temperature in (1e-4, 1e-40, 1e-320):
        assert generated(model, b"x", temperature=temperature) == generated(model, b"x", temperature=0.0)
    assert generated(model, b"x", top_k=1) == generated(model, b"x", temperature=0.0)
    assert generated(model, b"x", top_p=1e-9) == generated(model, b"x", temperature=0.0)


@pytest.mark.parametrize("options", [{}, {"top_k": 200}, {"top_p": 0.9}])
def test_rounding_rarely_changes_a_draw(options: dict[str, Any]):
    """Bytes of almost equal probability swap their order, which must not decide the draw."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.linspace(0, 1, VOCABULARY).expand(1000, -1)
    uniform = torch.rand(1000, 1, generator=generator)
    first, second = (
        draw(logits + torch.randn(logits.shape, generator=generator) / 200, Sampling(**options), uniform)
        for _ in range(2)
    )
    assert sum(one == other for one, other in zip(first, second, strict=True)) > 800


def test_the_same_seed_draws_the_same_bytes():
    model = tiny_model()
    assert generated(model, seed=1) == generated(model, seed=1) != generated(model, seed=2)


@pytest.mark.slow
def test_draws_follow_the_probabilities_and_the_padding_is_never_drawn():
    logits = torch.full((VOCABULARY,), -20.0)
    logits[[65, 66, 256, PADDING]] = torch.tensor([2.0, 1.0, 0.0, 9.0])
    generator = torch.Generator().manual_seed(0)
    draws = [sample(logits[None], Sampling(), [generator])[0] for _ in range(3000)]
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
    assert set(sample(logits.expand(300, -1), Sampling(**sampling), [generator] * 300)) == allowed


@pytest.mark.slow
def test_transformer_xl_generates_past_its_segment_with_its_memory():
    """With a memory of prompt and generated bytes, the result equals that of one long segment."""
    model = tiny_xl(memory_length=200)
    long = TransformerXL(TransformerXLConfig(width=16, layers=2, heads=2, sequence_length=200, memory_length=0)).eval()
    long.load_state_dict(model.state_dict())
    prompt = bytes(range(97, 123)) * 3
    for some in (model, long):
        with torch.no_grad():
            some.embedding.weight[SEPARATOR] = 0  # a document without an end
    drawn = generated(model, prompt, count=100)
    assert len(drawn) == 100
    assert drawn == generated(long, prompt, count=100)


@pytest.mark.slow
def test_generation_continues_past_the_context_and_takes_longer_prompts():
    model = tiny_model()
    with torch.no_grad():
        model.local_embedding.weight[SEPARATOR] = 0  # a document without an end
    assert len(generated(model, b"start", count=150)) == 150
    long = bytes(range(97, 123)) * 4
    assert generated(model, long, count=5) == generated(model, long[-16:], count=5)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_sampling_options_are_refused(wrong: dict[str, float]):
    with pytest.raises(SamplingError):
        Sampling(**wrong)
