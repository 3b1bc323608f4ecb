"""Laws of models that read more than the ids they predict: encoders, and encoders with a decoder."""

from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.vocabulary import PADDING, SEPARATOR, VOCABULARY
from pretrain.conformance.models import REFERENCE_TOLERANCE, TOLERANCE
from pretrain.conformance.subject import SEED, Law, Subject, require
from pretrain.models import ByteModel, EncodingDecoder, family
from pretrain.models.references import load_reference
from pretrain.objectives import Visibility

ENCODERS = frozenset({Visibility.bidirectional, Visibility.encoder_decoder})
"""Visibilities in which a score depends on ids that are given."""


def check_given_output(subject: Subject, folder: Path) -> None:
    """Check that `forward` returns a finite fp32 negative log-likelihood for every id of an example."""
    ids, given = subject.example(2)
    nats = forward(subject.build(), ids, given)
    require(nats.shape == ids.shape, f"forward returns {tuple(nats.shape)} for ids of {tuple(ids.shape)}")
    require(nats.dtype == torch.float32, f"forward returns {nats.dtype}, not torch.float32")
    require(bool(nats.isfinite().all() and (nats >= 0).all()), "a negative log-likelihood is negative or infinite")


def check_given_distribution(subject: Subject, folder: Path) -> None:
    """Check that the probabilities of all ids at a position add up to 1."""
    model = subject.build(torch.float64)
    symbols = model.head_weights()[0].shape[0]
    ids, given = (each.repeat(symbols, 1) for each in subject.example(1))
    ids[:, -1] = torch.arange(symbols)
    total = forward(model, ids, given)[:, -1].neg().exp().sum().item()
    require(abs(total - 1) <= TOLERANCE, f"probabilities of the last position add up to {total}")
    require(symbols >= VOCABULARY, f"the head has {symbols} ids, fewer than the vocabulary")


def check_given_visibility(subject: Subject, folder: Path) -> None:
    """Check that a score depends on all given ids, on earlier ids if there is a decoder, and on no other id or row."""
    model = subject.build(torch.float64)
    ids, given = subject.example(2)
    before, length = forward(model, ids, given), ids.shape[1]
    for place in sorted({0, 1, given.shape[1] // 2, given.shape[1] - 1}):
        after = forward(model, ids, _changed(given, place))
        unseen = ((after - before)[0].abs() <= TOLERANCE).nonzero().flatten().tolist()
        require(not unseen, f"given id {place} does not change the scores at {unseen}")
        require(torch.equal(after[1], before[1]), f"given id {place} of row 0 changes scores of row 1")
    has_decoder = subject.form.visibility is Visibility.encoder_decoder
    for place in sorted({0, 1, length // 2, length - 1}):
        differs = (forward(model, _changed(ids, place), given) - before).abs() > TOLERANCE
        expected = torch.zeros_like(differs)
        expected[0, place : length if has_decoder else place + 1] = True
        wrong = (differs != expected).nonzero().tolist()
        require(not wrong, f"id {place} of row 0 changes the wrong scores, or does not change them, at {wrong[:4]}")


def check_given_padding(subject: Subject, folder: Path) -> None:
    """Check that padding at the ends of ids and given ids changes no score before it, and none is infinite."""
    model = subject.build(torch.float64)
    ids, given = subject.example(2)
    for kept in sorted({1, ids.shape[1] // 2, ids.shape[1] - 1}):
        shared = kept if subject.form.visibility is Visibility.bidirectional else given.shape[1] // 2
        short = forward(model, ids[:, :kept], given[:, :shared])
        padded_ids, padded_given = ids.clone(), given.clone()
        padded_ids[:, kept:], padded_given[:, shared:] = PADDING, PADDING
        padded = forward(model, padded_ids, padded_given)
        worst = (padded[:, :kept] - short).abs().max().item()
        require(worst <= TOLERANCE, f"padding after {kept} ids changes a score before it by {worst:.3g}")
    nothing = torch.full_like(given, PADDING)
    require(
        bool(forward(model, ids, nothing).isfinite().all()), "a row of padding alone has scores that are no numbers"
    )


def check_given_reference(subject: Subject, folder: Path) -> None:
    """Check that the family's reference, if it has one, gives the scores of the model with the same weights."""
    if (reference := family(subject.config.family).reference) is None:
        return
    model, (ids, given) = subject.build(torch.float64), subject.example(2)
    given[:, -2:] = PADDING
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    logits = load_reference(reference, subject.config.model_dump(mode="json"), weights).logits(ids, given)
    nats = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    worst = (nats - forward(model, ids, given)).abs().max().item()
    require(worst <= REFERENCE_TOLERANCE, f"the scores of the reference differ from the model's by {worst:.3g}")


def check_given_decoder(subject: Subject, folder: Path) -> None:
    """Check that a decoder that read the source predicts as `forward` for every prefix, also when rows are selected."""
    model, (ids, given) = subject.build(torch.float64), subject.example(2)
    given[1, -3:] = PADDING
    expected = forward(model, ids, given)
    with torch.no_grad():
        for primed in range(ids.shape[1]):
            decoder = cast(EncodingDecoder, model.decoder(2))
            decoder.encode(given)
            logits = decoder.prime(ids[:, :primed])
            for place in range(primed, min(primed + 2, ids.shape[1])):
                if place > primed:
                    decoder.select(torch.tensor([1, 0]))
                    logits = decoder.step(ids.flip(0)[:, place - 1])
                of_row = ids if place == primed else ids.flip(0)
                nats = F.cross_entropy(logits.double(), of_row[:, place], reduction="none")
                worst = (nats - (expected if place == primed else expected.flip(0))[:, place]).abs().max().item()
                require(worst <= TOLERANCE, f"after {place} ids a decoder differs from forward by {worst:.3g}")
                require(decoder.length == place, f"a decoder that read {place} ids says that it read {decoder.length}")


def _changed(ids: Tensor, place: int) -> Tensor:
    """Return ids with another byte at a place of the first row."""
    other = ids.clone()
    other[0, place] = (ids[0, place] + 1) % SEPARATOR
    return other


def forward(model: ByteModel, ids: Tensor, given: Tensor) -> Tensor:
    """Return the scores of a pass without gradient."""
    torch.manual_seed(SEED)
    with torch.no_grad():
        nats: Tensor = model(ids, given)
    return nats


EXAMPLE_LAWS = (
    *(
        Law.of(check, visibilities=ENCODERS)
        for check in (
            check_given_output,
            check_given_distribution,
            check_given_visibility,
            check_given_padding,
            check_given_reference,
        )
    ),
    Law.of(check_given_decoder, visibilities=frozenset({Visibility.encoder_decoder})),
)
"""Laws of a model on one device that reads given ids."""
