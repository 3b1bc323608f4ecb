"""Answers of a model with an encoder: its cached decoder makes targets of sources, by sampling or by beam search."""

import math
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from data_pipeline.vocabulary import PADDING, SEPARATOR
from pretrain.evaluation.generation import Sampling, row_generator, sample
from pretrain.models import ByteModel, EncodingDecoder


def answer_rows(
    model: ByteModel, sources: Sequence[bytes], counts: Sequence[int], sampling: Sampling
) -> Iterator[tuple[int, int]]:
    """Yield at most as many bytes of each answer as `counts` says; fewer if the model ends it.

    All rows are decoded side by side. The draws of a row depend on its number and the seed.

    Args:
        model: the model, in evaluation mode.
        sources: a source for each row; each is cut to the model's source length.
        counts: most bytes of each answer.
        sampling: how bytes are drawn.

    Yields:
        (row, byte): the bytes of each row in their order.
    """
    if not sources:
        return
    decoder, logits = _begun(model, sources)
    generators = [row_generator(sampling.seed, row) for row in range(len(sources))]
    active = {row for row, count in enumerate(counts) if count}
    most = min(max(counts), _target_length(model))
    for produced in range(1, most + 1):
        drawn = sample(_of_answers(logits), sampling, generators)
        for row in sorted(active):
            if drawn[row] == SEPARATOR:
                active.discard(row)
            else:
                yield row, drawn[row]
                if produced == counts[row]:
                    active.discard(row)
        if not active or produced == most:
            return
        logits = decoder.step(torch.tensor(drawn, device=logits.device))


def beam_search(model: ByteModel, source: bytes, beams: int, most: int) -> bytes:
    """Return the answer of the highest log-likelihood by id that a beam search finds.

    An answer ends with a separator, which counts. Its log-likelihood is divided by its number of ids (Wu et al. 2016,
    with an exponent of 1), so that short answers are not preferred.

    Args:
        model: the model, in evaluation mode.
        source: the source, cut to the model's source length.
        beams: answers that are followed at a time.
        most: most bytes of the answer.
    """
    decoder, logits = _begun(model, [source])
    total = torch.zeros(1, dtype=torch.float64, device=logits.device)
    written: list[list[int]] = [[]]
    best, best_score = b"", -math.inf
    most = min(most, _target_length(model))
    for produced in range(1, most + 1):
        candidates = total[:, None] + _of_answers(logits).double().log_softmax(1)
        ended = candidates[:, SEPARATOR] / produced
        row = int(ended.argmax())
        if float(ended[row]) > best_score:
            best, best_score = bytes(written[row]), float(ended[row])
        candidates = candidates[:, :SEPARATOR]
        total, places = candidates.flatten().topk(min(beams, candidates.numel()))
        rows, ids = places // SEPARATOR, places % SEPARATOR
        written = [[*written[row], id_] for row, id_ in zip(rows.tolist(), ids.tolist(), strict=True)]
        # A log-likelihood only falls, so it is at best divided by the most ids that an answer may have.
        if float(total[0]) / (most + 1) < best_score:
            return best
        if produced == most:
            break
        decoder.select(rows)
        logits = decoder.step(ids)
    return bytes(written[0]) if float(total[0]) / most > best_score else best


def _begun(model: ByteModel, sources: Sequence[bytes]) -> tuple[EncodingDecoder, Tensor]:
    """Return a decoder that has read sources, and the logits of the first ids of their answers."""
    device = next(model.parameters()).device
    cut = [source[: _source_length(model)] for source in sources]
    read = torch.full((len(cut), max(1, *map(len, cut))), PADDING, dtype=torch.long)
    for row, source in zip(read, cut, strict=True):
        row[: len(source)] = torch.tensor(list(source), dtype=torch.long)
    decoder = cast(EncodingDecoder, model.decoder(len(cut)))
    decoder.encode(read.to(device))
    return decoder, decoder.prime(torch.empty(len(cut), 0, dtype=torch.long, device=device))


def _of_answers(logits: Tensor) -> Tensor:
    """Return logits with -inf for all but bytes and the separator."""
    allowed = logits.float().clone()
    allowed[:, SEPARATOR + 1 :] = float("-inf")
    return allowed


def _source_length(model: ByteModel) -> int:
    return int(cast(int, model.source_length))


def _target_length(model: ByteModel) -> int:
    return int(cast(int, model.target_length))
