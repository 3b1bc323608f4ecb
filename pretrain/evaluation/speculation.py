"""Self-speculation: further heads draft bytes, and the model checks all of them in one parallel pass.

    last hidden state ─▶ drafts of the heads ─┐
    last drawn byte ──────────────────────────┴▶ one pass ─▶ a byte is drawn after each ─▶ drafts from the first on that
                                                                                           is another byte: taken back

Blockwise parallel decoding does this for the likeliest bytes (Stern et al. 2018). Speculative sampling keeps a draft by
chance, so that the distribution stays (Leviathan et al., arXiv:2211.17192; Chen et al., arXiv:2302.01318). Here a byte
is drawn with the random number that it has without speculation, and a draft is kept if it is this byte. The bytes of a
seed are then the same with and without speculation, except where rounding decides. A draft is drawn with the same
number, so it often agrees.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import cast

import torch
from torch import Tensor

from data_pipeline.vocabulary import SEPARATOR
from pretrain.evaluation.generation import Sampling, SamplingError, contexts_of, draw, last_half, row_generator
from pretrain.models.base import ByteModel, RewindingDecoder


@dataclass
class Speculation:
    """Counts of a generation."""

    passes: int = 0
    """Passes of the model, those over prompts included."""
    drawn: int = 0
    """Ids that were drawn."""


def check_speculates(model: ByteModel) -> None:
    """Raise SamplingError if a model has no further heads, or a decoder that takes no byte back."""
    name = type(model).__name__
    if not model.rewinds:
        raise SamplingError(f"the decoder of this {name} cannot take bytes back, so it does not speculate")
    if model.multi_byte is None:
        raise SamplingError(
            f"this {name} has no further heads to speculate with; a run with model.multi_byte trains them"
        )


def speculate_rows(
    model: ByteModel,
    prompts: Sequence[bytes],
    counts: Sequence[int],
    sampling: Sampling,
    speculation: Speculation,
    *,
    after_separator: bool = False,
    before_separator: bool = False,
) -> Iterator[tuple[int, int]]:
    """Yield what `generate_rows` yields, one row after another.

    Args:
        model: the model, in evaluation mode.
        prompts: the prompts.
        counts: most bytes after each prompt.
        sampling: how bytes are drawn.
        speculation: counts, which grow.
        after_separator: as of `generate_rows`.
        before_separator: as of `generate_rows`.

    Raises:
        SamplingError: the model does not speculate.
    """
    check_speculates(model)
    contexts = contexts_of(model, prompts, after_separator=after_separator, before_separator=before_separator)
    for row, context in contexts.items():
        numbers = _Numbers(row_generator(sampling.seed, row))
        yield from ((row, byte) for byte in _row(model, context, counts[row], sampling, numbers, speculation))


def _row(
    model: ByteModel, history: list[int], count: int, sampling: Sampling, numbers: "_Numbers", speculation: Speculation
) -> Iterator[int]:
    """Yield the bytes of one row, and append them to the history."""
    device = next(model.parameters()).device

    def primed(context: list[int]) -> tuple[RewindingDecoder, list[int]]:
        decoder = cast(RewindingDecoder, model.decoder(1))
        logits = decoder.prime(torch.tensor([context], dtype=torch.long, device=device))
        speculation.passes += 1
        return decoder, draw(logits, sampling, numbers.take(1))

    decoder, drawn = primed(history)
    left = count
    while True:
        for id_ in drawn:
            history.append(id_)
            speculation.drawn += 1
            if id_ == SEPARATOR:
                return
            yield id_
        left -= len(drawn)
        if not left:
            return
        room = math.inf if model.decodes_without_end else model.sequence_length - 1 - decoder.length
        if room < 1:
            decoder, drawn = primed(last_half(model, history))
        else:
            drawn = _checked(model, decoder, history[-1], int(min(room, left)), sampling, numbers)
            speculation.passes += 1


def _checked(
    model: ByteModel, decoder: RewindingDecoder, last: int, most: int, sampling: Sampling, numbers: "_Numbers"
) -> list[int]:
    """Read the last id and the drafts after it in one pass; return the ids that are drawn from its logits.

    An id is drawn after each id that was read, up to the first draft that is another one than the drawn id. The decoder
    has then read all ids but the last drawn one.

    Args:
        model: the model.
        decoder: it has not read the last id.
        last: the last id.
        most: most ids to read.
        sampling: how ids are drawn.
        numbers: random numbers of the next ids.
    """
    assert model.multi_byte is not None
    with torch.no_grad():
        further = model.multi_byte.logits(decoder.states[0, -1])[: min(most, decoder.most_fed) - 1]
    drafts = draw(further, sampling, numbers.next(len(further)))
    logits = decoder.feed(torch.tensor([[last, *drafts]], device=further.device))[0]
    drawn = draw(logits, sampling, numbers.next(len(logits)))
    agreed = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(drafts, drawn, strict=False)))
    decoder.rewind(len(drafts) - agreed)
    numbers.take(agreed + 1)
    return drawn[: agreed + 1]


class _Numbers:
    """Random numbers of a row, one for each id, in the order in which `sample` takes them."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._ahead: list[Tensor] = []

    def next(self, count: int) -> Tensor:
        """Return the numbers of the next ids, (count, 1)."""
        while len(self._ahead) < count:
            self._ahead.append(torch.rand(1, generator=self._generator))
        return torch.stack(self._ahead[:count]) if count else torch.empty(0, 1)

    def take(self, count: int) -> Tensor:
        """Return the numbers of the next ids, and continue after them."""
        taken = self.next(count)
        del self._ahead[:count]
        return taken
