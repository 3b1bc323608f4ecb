"""Laws of a model on one device: causality, decoding, FLOPs, first values, and scores."""

from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.preparation.prepare import PrepareOptions, prepare
from data_pipeline.vocabulary import PADDING, SEPARATOR, VOCABULARY
from pretrain.conformance.patches import check_activations, check_patches, check_useful_flops
from pretrain.conformance.subject import SEED, Law, Subject, require
from pretrain.evaluation.modes import Mode, evaluate_model
from pretrain.models import Decoder, RewindingDecoder, family
from pretrain.models.references import load_reference
from pretrain.objectives import Visibility

TOLERANCE = 1e-6
"""Absolute, of negative log-likelihoods in float64: what a sum in another order changes."""

REFERENCE_TOLERANCE = 1e-5
"""Absolute, of negative log-likelihoods in float64 whose angles or sinusoids may be in fp32."""


def check_output(subject: Subject, folder: Path) -> None:
    """Check that `forward` returns (rows, T) fp32 negative log-likelihoods, finite at scored positions."""
    for length in (1, subject.sequence_length):
        ids = subject.ids(2, length)
        nats = forward(subject.build(), ids)
        require(nats.shape == ids.shape, f"forward returns {tuple(nats.shape)} for ids of {tuple(ids.shape)}")
        require(nats.dtype == torch.float32, f"forward returns {nats.dtype}, not torch.float32")
        scored = nats[:, subject.build().scored(length)]
        require(scored.numel() > 0, f"no position of a row of {length} ids is scored")
        require(
            bool(scored.isfinite().all() and (scored >= 0).all()), "a negative log-likelihood is negative or infinite"
        )


def check_distribution(subject: Subject, folder: Path) -> None:
    """Check that the probabilities of all ids at a position add up to 1."""
    model, length = subject.build(torch.float64), subject.sequence_length
    ids = subject.ids(1).repeat(VOCABULARY, 1)
    ids[:, -1] = torch.arange(VOCABULARY)
    if length > 1:
        # PADDING ends a row and is no target: its probability is the rest.
        total = forward(model, ids[:PADDING])[:, -1].neg().exp().sum().item()
        require(total <= 1 + TOLERANCE, f"probabilities of the last position add up to {total}")
        require(total > 1 - 0.1, f"probabilities of the last position add up to {total} without the padding")


def check_causality(subject: Subject, folder: Path) -> None:
    """Check that a score depends on its byte and earlier ones, not on later ones or on other rows."""
    model, length = subject.build(torch.float64), subject.sequence_length
    ids = subject.ids(2)
    before, scored = forward(model, ids), model.scored(length)
    first = range(length)[scored].start
    for changed in sorted({0, 1, length // 3, length // 2, first, length - 2, length - 1} & set(range(length))):
        other = ids.clone()
        other[0, changed] = (ids[0, changed] + 1) % SEPARATOR
        after = forward(model, other)
        differs = (after - before).abs() > TOLERANCE
        differs[:, :first] = False
        early = differs[0, :changed].nonzero().flatten().tolist()
        require(not early, f"byte {changed} changes the scores of earlier positions {early}")
        require(not differs[1].any(), f"byte {changed} of row 0 changes scores of row 1")
        if changed < length - 1:
            require(bool(differs[0].any()), f"byte {changed} changes no score")


def check_padding(subject: Subject, folder: Path) -> None:
    """Check that padding at the end of a row changes no score before it."""
    model, length = subject.build(torch.float64), subject.sequence_length
    for kept in sorted({1, length // 2, length - 1} & set(range(1, length))):
        ids = subject.ids(2)
        ids[:, kept:] = PADDING
        padded, short = forward(model, ids), forward(model, ids[:, :kept])
        both = [
            position for position in range(length)[model.scored(length)] if position in range(kept)[model.scored(kept)]
        ]
        worst = (padded[:, both] - short[:, both]).abs().max().item() if both else 0.0
        require(worst <= TOLERANCE, f"padding after {kept} bytes changes a score before it by {worst:.3g}")


def check_documents(subject: Subject, folder: Path) -> None:
    """Check that what precedes a separator changes no score after it, if attention does not cross documents."""
    subject = subject.within_documents()
    model, length = subject.build(torch.float64), subject.sequence_length
    if model.attends_across_documents:
        return
    places = torch.arange(length)
    later = places > places[:, None]
    later &= torch.isin(places, places[model.scored(length)])
    ids = subject.short_documents(1).repeat(length, 1).fill_diagonal_(SEPARATOR)  # row p has a separator at p
    other = torch.where(places < places[:, None], subject.short_documents(length, seed=SEED + 1), ids)
    differs = ((forward(model, ids) - forward(model, other)).abs() > TOLERANCE) & later
    for place in differs.any(1).nonzero().flatten().tolist():
        leaks = differs[place].nonzero().flatten().tolist()
        require(False, f"bytes before the separator at {place} change the scores after it at {leaks}")


def check_decoder(subject: Subject, folder: Path) -> None:
    """Check that a primed decoder predicts as `forward` for every prefix, as do its steps while all are scored."""
    model, length = subject.build(torch.float64), subject.sequence_length
    ids = torch.cat([subject.ids(2), subject.short_documents(2)])
    all_scored = len(range(length)[model.scored(length)])
    expected = [forward(model, ids[:, : prefix + 1])[:, -1] for prefix in range(length)]

    def compare(logits: Tensor, prefix: int, name: str) -> None:
        nats = F.cross_entropy(logits.double(), ids[:, prefix], reduction="none")
        worst = (nats - expected[prefix]).abs().max().item()
        require(worst <= TOLERANCE, f"after {prefix} bytes a {name} decoder differs from forward by {worst:.3g}")

    with torch.no_grad():
        stepped = model.decoder(len(ids))
        logits = stepped.prime(ids[:, :0])
        for prefix in range(length):
            primed = model.decoder(len(ids))
            compare(primed.prime(ids[:, :prefix]), prefix, "primed")
            if prefix < all_scored:
                compare(logits, prefix, "stepped")
            if prefix + 1 < all_scored:
                compare(primed.step(ids[:, prefix]), prefix + 1, "primed and stepped")
            require(stepped.length == prefix, f"a decoder that read {prefix} bytes says that it read {stepped.length}")
            if prefix + 1 < length:
                logits = stepped.step(ids[:, prefix])
        require(model.decodes_without_end or _refuses(stepped, ids[:, -1]), "a decoder reads more than sequence_length")


def check_rewinding(subject: Subject, folder: Path) -> None:
    """Check that a decoder that rewinds predicts as `forward` after it read several ids at once and took some back."""
    model, length = subject.build(torch.float64), subject.sequence_length
    if not model.rewinds:
        return
    ids = torch.cat([subject.ids(2), subject.short_documents(2)])
    other, expected = (ids + 1) % SEPARATOR, forward(model, ids)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        decoder = cast(RewindingDecoder, model.decoder(len(ids)))
        place = int(torch.randint(length // 2, (), generator=generator))
        with torch.no_grad():
            decoder.prime(ids[:, :place])
        while place < length - 1:
            most = min(decoder.most_fed, length - 1 - place)
            count = 1 + int(torch.randint(most, (), generator=generator))
            right = 1 + int(torch.randint(count, (), generator=generator))
            fed = torch.cat([ids[:, place : place + right], other[:, place + right : place + count]], 1)
            logits = decoder.feed(fed)
            require(torch.equal(model.logits(decoder.states), logits), "the states of a decoder do not have its logits")
            decoder.rewind(count - right)
            targets = ids[:, place + 1 : place + 1 + right]
            nats = F.cross_entropy(logits[:, :right].transpose(1, 2), targets, reduction="none")
            worst = (nats - expected[:, place + 1 : place + 1 + right]).abs().max().item()
            place += right
            require(worst <= TOLERANCE, f"up to byte {place} a rewinding decoder differs from forward by {worst:.3g}")
            require(decoder.length == place, f"a decoder of {place} bytes says that it read {decoder.length}")
            require(decoder.states.shape[1] == right, f"a decoder has {decoder.states.shape[1]} states of {right} ids")


def _refuses(decoder: Decoder, ids: Tensor) -> bool:
    """Return whether a decoder with a full context raises ValueError."""
    try:
        decoder.step(ids)
    except ValueError:
        return True
    return False


def check_reference(subject: Subject, folder: Path) -> None:
    """Check that the family's reference, if it has one, gives the scores of the model with the same weights."""
    if (reference := family(subject.config.family).reference) is None:
        return
    model, ids = subject.build(torch.float64), subject.short_documents(2)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    logits = load_reference(reference, subject.config.model_dump(mode="json"), weights).logits(ids)
    scored = range(subject.sequence_length)[model.scored(subject.sequence_length)]
    require(logits.shape[1] == len(scored), f"the reference scores {logits.shape[1]} ids, and the model {len(scored)}")
    nats = F.cross_entropy(logits.transpose(1, 2), ids[:, scored], reduction="none")
    worst = (nats - forward(model, ids)[:, scored]).abs().max().item()
    require(worst <= REFERENCE_TOLERANCE, f"the scores of the reference differ from the model's by {worst:.3g}")


def check_flops(subject: Subject, folder: Path) -> None:
    """Check that `flops` is what torch counts."""
    model = subject.build(torch.bfloat16)  # its attention is plain matrix products, which torch counts
    longest = subject.form.length
    for length in sorted({1, longest // 2 or 1, longest}):
        memory = model.empty_memory(1)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(*subject.arguments(1, length), *([memory] if memory else []))
        counted, stated = counter.get_total_flops(), model.flops(length)
        require(counted == stated, f"for a row of {length} bytes flops says {stated:,}, torch counts {counted:,}")


def check_first_values(subject: Subject, folder: Path) -> None:
    """Check that first values are a function of seed, name and place, and that no two blocks share a parameter."""
    model, again = subject.build(), subject.build()
    for name, parameter in model.named_parameters():
        values = model.first_values(name, tuple(parameter.shape), SEED)
        require(bool(values.isfinite().all()), f"a first value of {name} is not finite")
        require(values.dtype == torch.float32, f"first values of {name} are {values.dtype}, not torch.float32")
        same = again.first_values(name, tuple(parameter.shape), SEED)
        require(torch.equal(values, same), f"first values of {name} differ between two models of one seed")
        middle = len(values) // 3
        parts = [(0, middle), (middle, None)]
        drawn = [again.first_values(name, tuple(parameter.shape), SEED, begin=b, end=e) for b, e in parts]
        require(torch.equal(values, torch.cat(drawn)), f"first values of {name} depend on the range that is drawn")
    in_blocks = [id(parameter) for unit in model.units() for parameter in unit.parameters()]
    require(len(in_blocks) == len(set(in_blocks)), "two blocks share a parameter")


def check_gradients(subject: Subject, folder: Path) -> None:
    """Check that the loss of a training pass has a finite gradient for every parameter."""
    model = subject.build().train()
    torch.manual_seed(SEED)
    row_nats = model(*subject.arguments(8))
    row_nats[:, model.scored(row_nats.shape[1])].sum().backward()
    none = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    require(not none, f"no gradient reaches {', '.join(none)}")
    wrong = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    require(not wrong, f"gradients are not finite: {', '.join(wrong)}")


def check_bytes_scored_once(subject: Subject, folder: Path) -> None:
    """Check that evaluation scores every byte of every document once, which takes scored ends of equal length."""
    model, longest = subject.build(), range(subject.sequence_length)
    count = len(longest[model.scored(len(longest))])
    for length in range(1, len(longest) + 1):
        scored, expected = range(length)[model.scored(length)], range(max(0, length - count), length)
        require(scored == expected, f"of a row of {length} ids {scored} is scored, not {expected}")
    source = folder / "documents"
    source.mkdir()
    length = subject.sequence_length
    generator = torch.Generator().manual_seed(SEED)
    for number, size in enumerate((1, length - 1, length, length + 1, 3 * length + 5)):
        content = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
        (source / f"{number}").write_bytes(content.numpy().tobytes())
    prepare([source], folder / "corpus", PrepareOptions(), lambda done, total: None)
    corpus = Corpus(folder / "corpus")
    total = evaluate_model(model, corpus, Mode.windows, rows=3).total.bytes
    require(total == corpus.raw_bytes, f"evaluation scores {total} bytes of a corpus of {corpus.raw_bytes}")


def forward(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Return the scores of a pass without gradient."""
    with torch.no_grad():
        nats: Tensor = model(ids)
    return nats


CAUSAL = frozenset({Visibility.causal})
MODEL_LAWS = (
    *(
        Law.of(check, visibilities=CAUSAL)
        for check in (
            check_output,
            check_distribution,
            check_causality,
            check_padding,
            check_documents,
            check_decoder,
            check_rewinding,
            check_reference,
            check_bytes_scored_once,
        )
    ),
    *map(Law.of, (check_flops, check_first_values, check_gradients)),
    *(Law.of(check, visibilities=CAUSAL) for check in (check_patches, check_useful_flops, check_activations)),
)
