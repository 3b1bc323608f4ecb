"""Modes of evaluation: the bytes that each byte is predicted from.

Results name their mode and stride; results of different modes or strides are not comparable.
"""

from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from byteloom.core.text import count
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.documents import Piece
from data_pipeline.stream.rows import Ids
from pretrain.evaluation.evaluate import Progress, Scored, add_up, score_windows, score_with_memory, scorer
from pretrain.evaluation.scores import Evaluation, EvaluationError, GroupOf
from pretrain.evaluation.window_entropies import EntropyScorer
from pretrain.evaluation.windows import windows_of
from pretrain.models import ByteModel, ModelConfig, family


class Mode(StrEnum):
    """Mode of evaluation: the bytes that each byte is predicted from."""

    windows = "windows"
    """Predict from the window alone. It moves by the bytes that the model scores at its end: T, or fewer."""
    sliding = "sliding"
    """Like windows, but move by at most T/2 (Press et al. 2020): at least T/2 bytes of context, twice the cost."""
    strided = "strided"
    """Like windows, with strided inference over patches (see `strided`), at twice the cost."""
    sliding_strided = "sliding-strided"
    """Combine sliding and strided, at four times the cost."""
    memory = "memory"
    """Predict from the window and the memory of earlier windows, in one pass over every byte."""

    @property
    def slides(self) -> bool:
        """Whether windows move by at most half their length."""
        return self in (Mode.sliding, Mode.sliding_strided)

    @property
    def is_strided(self) -> bool:
        """Whether strided inference is used."""
        return self in (Mode.strided, Mode.sliding_strided)


def evaluate_model(
    model: ByteModel,
    corpus: Corpus,
    mode: Mode,
    rows: int,
    group_of: GroupOf = lambda key: "all",
    progress: Progress = lambda done: None,
    stride: int | None = None,
    *,
    after_separator: bool = False,
) -> Evaluation:
    """Return the sums over every byte of a corpus, scored in a mode.

    Args:
        model: the model, in evaluation mode.
        corpus: the corpus to score.
        mode: the bytes that each byte is predicted from.
        rows: windows scored at once.
        group_of: maps a document's key to its group.
        progress: called with the bytes scored.
        stride: bytes scored at the end of a window; `stride_of` the mode if None.
        after_separator: whether a separator, which is not scored, precedes each document.

    Raises:
        EvaluationError: the model does not support the mode or the stride, or a loss is not a usable number.
    """
    scored = score_documents(model, corpus.pieces(), mode, rows, stride, after_separator=after_separator)
    return add_up(scored, group_of, progress)


def score_documents(
    model: ByteModel,
    pieces: Iterable[Piece],
    mode: Mode,
    rows: int,
    stride: int | None = None,
    *,
    after_separator: bool = False,
) -> Scored:
    """Return an iterator over the windows of documents with the nats of their ids. Each byte is scored once.

    Args:
        model: the model, in evaluation mode.
        pieces: the documents in order, each in consecutive pieces.
        mode: the bytes that each byte is predicted from.
        rows: windows scored at once.
        stride: bytes scored at the end of a window; `stride_of` the mode if None.
        after_separator: whether a separator, which is not scored, precedes each document.

    Raises:
        EvaluationError: the model does not support the mode or the stride.
    """
    check_mode(model, mode)
    length, most = model.sequence_length, stride_of(model)
    if stride is not None and stride < 1:
        raise EvaluationError(f"stride is {stride}; it must be at least 1")
    if stride is not None and stride > most:
        raise EvaluationError(f"stride is {stride}; this model scores at most {count(most, 'byte')} of a window")
    if mode is Mode.memory:
        if stride not in (None, length):
            raise EvaluationError(f"stride is {stride}; mode {mode} takes no stride: windows follow each other")
        return score_with_memory(model, pieces, rows, after_separator=after_separator)
    nats_of = scorer(model)
    if mode.is_strided:
        assert model.patch_size is not None and not isinstance(nats_of, EntropyScorer)
        nats_of = strided(nats_of, model.patch_size)
    stride = stride or stride_of(model, mode)
    windows = windows_of(pieces, length, stride, after_separator=after_separator)
    return score_windows(nats_of, windows, rows)


def check_mode(model: ByteModel, mode: Mode) -> None:
    """Raise EvaluationError if a model does not support a mode."""
    if mode not in model.evaluation_modes:
        supported = ", ".join(each for each in Mode if each in model.evaluation_modes)
        raise EvaluationError(f"this model does not support mode {mode}; it supports {supported}")
    if mode is Mode.memory and not model.empty_memory(1):
        raise EvaluationError(f"mode {mode} needs a model that carries memory; this one carries none")
    if mode.is_strided and model.patch_size is None:
        raise EvaluationError(f"mode {mode} needs a model with patches; this one has none")


def check_usage(config: ModelConfig, usage: Mapping[str, Any], mode: Mode) -> None:
    """Raise EvaluationError if a usage option has no effect in a mode.

    Args:
        config: config of the model.
        usage: values by the names of usage options of the model's family.
        mode: the mode of the evaluation.
    """
    for option in family(config.family).usage_options:
        if option.name in usage and option.mode not in (None, mode):
            raise EvaluationError(
                f"--{option.name} has no effect in mode {mode}; add --mode {option.mode}, or leave the option out"
            )


def stride_of(model: ByteModel, mode: Mode = Mode.windows) -> int:
    """Return the bytes that a mode scores at the end of a full window.

    These are all that the model scores there, or at most half a window if the mode slides. The stride of `windows` is
    the largest stride at which the model scores every byte.
    """
    scored = len(range(model.sequence_length)[model.scored(model.sequence_length)])
    return min(scored, -(-model.sequence_length // 2)) if mode.slides else scored


def strided(nats_of: Callable[[Ids], Tensor], patch_size: int) -> Callable[[Ids], Tensor]:
    """Return a scorer with strided inference (MEGABYTE, arXiv:2305.07185, section 2.3.3).

    A second pass reads the window without its first P/2 bytes. Each pass keeps the first halves of its patches, where
    predictions are best. The paper does not define the border: here the first patch of the window also keeps the
    second half of the first pass, which the second pass would predict without context.

    Raises:
        EvaluationError: the patch size is odd.
    """
    if patch_size % 2:
        raise EvaluationError(f"strided inference needs an even model.patch_size, and this model's is {patch_size}")
    half = patch_size // 2

    def nats_of_two_passes(ids: Ids) -> Tensor:
        nats = nats_of(ids)
        positions = torch.arange(ids.shape[1])
        second_halves = positions[(positions >= patch_size) & (positions % patch_size >= half)]
        if len(second_halves):
            nats[:, second_halves] = nats_of(ids[:, half:])[:, second_halves - half]
        return nats

    return nats_of_two_passes
