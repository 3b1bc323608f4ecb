"""Bytes out of a model, one at a time in each of several rows, through its cached decoder."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from byteloom.core.seeds import seed_of
from data_pipeline.vocabulary import PADDING, SEPARATOR
from pretrain.models.base import ByteModel, Decoder


class SamplingError(Exception):
    """A sampling option is out of its bounds."""


@dataclass(frozen=True)
class Sampling:
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest byte."""
    top_k: int | None = None
    """Draw from the k likeliest only."""
    top_p: float = 1.0
    """Draw from the likeliest whose probabilities first add up to p."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise SamplingError(f"--temperature is {self.temperature}; it must be at least 0, and finite")
        if self.top_k is not None and self.top_k < 1:
            raise SamplingError(f"--top-k is {self.top_k}; it must be at least 1")
        if not 0 < self.top_p <= 1:
            raise SamplingError(f"--top-p is {self.top_p}; it must be more than 0 and at most 1")


def generate(model: ByteModel, prompt: bytes, count: int, sampling: Sampling) -> Iterator[int]:
    """The bytes of `generate_rows` for one prompt."""
    return (byte for _, byte in generate_rows(model, [prompt], count, sampling))


def generate_rows(
    model: ByteModel, prompts: Sequence[bytes], count: int, sampling: Sampling
) -> Iterator[tuple[int, int]]:
    """At most `count` bytes that follow each prompt; fewer where the model ends the document.

    Rows with prompts of one length go side by side, and such batches one after another, so that each prompt is read in
    one parallel pass. What a row draws is a function of its prompt, its number and the seed; the other rows change at
    most the rounding of its logits.

    When the context is full, decoding goes on with its last half as the prompt of a fresh decoder. A prompt longer than
    the context is cut to its last part in the same way. Neither happens to a model that decodes without end.

    Yields:
        (row, byte): a row's own bytes in their order.
    """
    histories = {row: list(prompt) for row, prompt in enumerate(prompts)}
    if not model.decodes_without_end:
        histories = {
            row: history if len(history) < model.sequence_length else _last_half(model, history)
            for row, history in histories.items()
        }
    for length in sorted({len(history) for history in histories.values()}):
        batch = {row: history for row, history in histories.items() if len(history) == length}
        yield from _side_by_side(model, batch, count, sampling)


def _side_by_side(
    model: ByteModel, histories: Mapping[int, list[int]], count: int, sampling: Sampling
) -> Iterator[tuple[int, int]]:
    """`generate_rows` of rows whose histories, which it makes longer, are of one length."""
    generators = [row_generator(sampling.seed, row) for row in histories]
    device = next(model.parameters()).device
    under_way = set(histories)

    def primed(contexts: list[list[int]]) -> tuple[Decoder, Tensor]:
        decoder = model.decoder(len(contexts))
        return decoder, decoder.prime(torch.tensor(contexts, dtype=torch.long, device=device))

    decoder, logits = primed(list(histories.values()))
    for produced in range(1, count + 1):
        drawn = sample(logits, sampling, generators)
        for (row, history), id_ in zip(histories.items(), drawn, strict=True):
            history.append(id_)
            if id_ == SEPARATOR:
                under_way.discard(row)
            if row in under_way:
                yield row, id_
        if produced == count or not under_way:
            return
        if model.decodes_without_end or decoder.length + 1 < model.sequence_length:
            logits = decoder.step(torch.tensor(drawn, device=device))
        else:
            decoder, logits = primed([_last_half(model, history) for history in histories.values()])


def _last_half(model: ByteModel, history: list[int]) -> list[int]:
    return history[len(history) - model.sequence_length // 2 :]


def row_generator(seed: int, row: int) -> torch.Generator:
    """The random generator of one row, so that its draws are the same beside any others."""
    return torch.Generator().manual_seed(seed_of("row", seed, row))


def sample(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> list[int]:
    """An id for each row of (rows, VOCABULARY) logits: a byte or the separator, by one draw of the row's generator."""
    logits = logits.detach().float().cpu().clone()
    logits[:, PADDING] = float("-inf")
    if sampling.temperature == 0:
        return logits.argmax(1).tolist()
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        smallest = logits.topk(min(sampling.top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    probabilities, order = logits.double().softmax(1).sort(descending=True, stable=True)
    before = probabilities.cumsum(1) - probabilities
    up_to = probabilities.masked_fill(before >= sampling.top_p, 0.0).cumsum(1)
    # A draw has 24 bits and sums have 53, so it is below the sum of all, even after rounding.
    uniform = torch.stack([torch.rand(1, generator=generator) for generator in generators])
    chosen = (up_to <= uniform * up_to[:, -1:]).sum(1, keepdim=True)
    return order.gather(1, chosen)[:, 0].tolist()
