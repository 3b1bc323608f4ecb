"""Generate bytes with the cached decoder of a model, in several rows at once."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from byteloom.core.errors import CorrectableError
from byteloom.core.seeds import seed_of
from data_pipeline.vocabulary import PADDING, SEPARATOR
from pretrain.models.base import ByteModel, Decoder

COLDEST = 1e-30
"""Least temperature above 0 that is used. Logits divided by less are infinite in fp32."""


class SamplingError(CorrectableError):
    """A sampling option is out of bounds."""


@dataclass(frozen=True)
class Sampling:
    """Options that choose the next byte from its logits."""

    temperature: float = 1.0
    """Divisor of the logits; 0 takes the likeliest byte."""
    top_k: int | None = None
    """Number of likeliest bytes to draw from. None: all."""
    top_p: float = 1.0
    """Probability that the likeliest bytes to draw from must add up to."""
    seed: int = 0
    separators: bool = True
    """True if the model may write a separator, which ends the document. False if it was trained without separators."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise SamplingError(f"temperature is {self.temperature}; it must be at least 0, and finite")
        if self.top_k is not None and self.top_k < 1:
            raise SamplingError(f"top-k is {self.top_k}; it must be at least 1")
        if not 0 < self.top_p <= 1:
            raise SamplingError(f"top-p is {self.top_p}; it must be more than 0 and at most 1")


def generate_rows(
    model: ByteModel,
    prompts: Sequence[bytes],
    counts: Sequence[int],
    sampling: Sampling,
    *,
    after_separator: bool = False,
    before_separator: bool = False,
) -> Iterator[tuple[int, int]]:
    """Yield at most as many bytes after each prompt as `counts` says; fewer if the model ends the document.

    Rows with prompts of equal length and equal counts are decoded together, so that one parallel pass reads each
    prompt. The draws of a row depend on its prompt, its number and the seed; other rows change at most the rounding of
    its logits.

    When the context is full, a new decoder reads its last half as the prompt. A prompt that is longer than the context
    is cut in the same way. A model that decodes without end needs neither.

    Args:
        model: the model, in evaluation mode.
        prompts: the prompts.
        counts: most bytes after each prompt.
        sampling: how bytes are drawn.
        after_separator: whether a separator precedes each prompt, as it precedes documents in training.
        before_separator: whether a separator follows each prompt, as it follows the source of a pair.

    Yields:
        (row, byte): the bytes of each row in their order.
    """
    histories = contexts_of(model, prompts, after_separator=after_separator, before_separator=before_separator)
    for length, count in sorted({(len(history), counts[row]) for row, history in histories.items()}):
        batch = {row: history for row, history in histories.items() if (len(history), counts[row]) == (length, count)}
        yield from _side_by_side(model, batch, count, sampling)


def contexts_of(
    model: ByteModel, prompts: Sequence[bytes], *, after_separator: bool, before_separator: bool
) -> dict[int, list[int]]:
    """Return the ids that a decoder reads first, by row; see `generate_rows`."""
    before, after = ([SEPARATOR] if is_wanted else [] for is_wanted in (after_separator, before_separator))
    contexts = {row: [*before, *prompt, *after] for row, prompt in enumerate(prompts)}
    if model.decodes_without_end:
        return contexts
    return {
        row: context if len(context) < model.sequence_length else last_half(model, context)
        for row, context in contexts.items()
    }


def _side_by_side(
    model: ByteModel, histories: Mapping[int, list[int]], count: int, sampling: Sampling
) -> Iterator[tuple[int, int]]:
    """Yield the bytes of rows with histories of equal length, and append them to the histories."""
    generators = [row_generator(sampling.seed, row) for row in histories]
    device = next(model.parameters()).device
    active = set(histories)

    def primed(contexts: list[list[int]]) -> tuple[Decoder, Tensor]:
        decoder = model.decoder(len(contexts))
        return decoder, decoder.prime(torch.tensor(contexts, dtype=torch.long, device=device))

    decoder, logits = primed(list(histories.values()))
    for produced in range(1, count + 1):
        drawn = sample(logits, sampling, generators)
        for (row, history), id_ in zip(histories.items(), drawn, strict=True):
            history.append(id_)
            if id_ == SEPARATOR:
                active.discard(row)
            if row in active:
                yield row, id_
        if produced == count or not active:
            return
        if model.decodes_without_end or decoder.length + 1 < model.sequence_length:
            logits = decoder.step(torch.tensor(drawn, device=device))
        else:
            decoder, logits = primed([last_half(model, history) for history in histories.values()])


def last_half(model: ByteModel, history: list[int]) -> list[int]:
    """Return the context of a new decoder, once the context is full."""
    return history[len(history) - model.sequence_length // 2 :]


def row_generator(seed: int, row: int) -> torch.Generator:
    """Return the random generator of a row, which is independent of the other rows."""
    return torch.Generator().manual_seed(seed_of("row", seed, row))


def sample(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> list[int]:
    """Return an id (a byte or the separator) for each row of (rows, VOCABULARY) logits.

    Each row takes one number from its generator.
    """
    if sampling.temperature == 0:
        return draw(logits, sampling, torch.empty(0))
    return draw(logits, sampling, torch.stack([torch.rand(1, generator=generator) for generator in generators]))


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> list[int]:
    """Return an id (a byte or the separator) for each row of (rows, VOCABULARY) logits.

    Args:
        logits: of the ids.
        sampling: how ids are drawn.
        uniform: (rows, 1) random numbers of at least 0 and less than 1. Temperature 0 uses none.
    """
    logits = logits.detach().float().cpu().clone()
    logits[:, PADDING] = float("-inf")
    if not sampling.separators:
        logits[:, SEPARATOR] = float("-inf")
    if sampling.temperature == 0:
        return logits.argmax(1).tolist()
    logits = logits / max(sampling.temperature, COLDEST)
    if sampling.top_k is not None:
        smallest = logits.topk(min(sampling.top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    probabilities = logits.double().softmax(1)
    if sampling.top_p < 1:
        falling, order = probabilities.sort(descending=True, stable=True)
        before = falling.cumsum(1) - falling
        probabilities = probabilities.scatter(1, order, falling.masked_fill(before >= sampling.top_p, 0.0))
    # The sums are in the order of the ids: rounding would swap ids in an order by probability, and the draw with them.
    up_to = probabilities.cumsum(1)
    # A draw has 24 bits and sums have 53, so a draw is below the total even after rounding.
    return (up_to <= uniform * up_to[:, -1:]).sum(1).tolist()
