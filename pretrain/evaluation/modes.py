"""Modes of evaluation: the bytes that each byte is predicted from.

Results name their mode and stride; results of different modes or strides are not comparable.
"""

from collections.abc import Callable
from enum import StrEnum

import torch
from torch import Tensor

from byteloom.core.words import count
from data_pipeline.corpus.shards import Corpus
from data_pipeline.stream.rows import Ids
from pretrain.evaluation.evaluate import Progress, evaluate, evaluate_with_memory, scorer
from pretrain.evaluation.scores import Evaluation, EvaluationError, GroupOf
from pretrain.models import ByteModel
from pretrain.models.families.megabyte import Megabyte
from pretrain.models.families.transformer_xl import TransformerXL


class Mode(StrEnum):
    """What a byte is predicted from."""

    windows = "windows"
    """Its window alone, moved by as many bytes as the model scores at its end: T, or a Perceiver AR's N."""
    sliding = "sliding"
    """As windows, moved by T/2 at most (Press et al. 2020): at least T/2 bytes of context, at twice the cost."""
    strided = "strided"
    """As windows, with MEGABYTE's strided inference (section 2.3.3; see `strided`), at twice the cost."""
    sliding_strided = "sliding-strided"
    """Both, at four times the cost."""
    memory = "memory"
    """Its window and the memory of those before: Transformer-XL's way. One pass over every byte."""

    @property
    def slides(self) -> bool:
        return self in (Mode.sliding, Mode.sliding_strided)

    @property
    def is_strided(self) -> bool:
        return self in (Mode.strided, Mode.sliding_strided)


def evaluate_model(
    model: ByteModel,
    corpus: Corpus,
    mode: Mode,
    rows: int,
    group_of: GroupOf = lambda key: "all",
    progress: Progress = lambda done: None,
    stride: int | None = None,
) -> Evaluation:
    """Scores every byte of a corpus once, in a mode.

    Args:
        rows: windows scored at once.
        stride: bytes scored at the end of a window, in the place of `stride_of` the mode.
    Raises:
        EvaluationError: the mode or the stride is not for this model.
    """
    length, most = model.sequence_length, stride_of(model)
    if stride is not None and stride > most:
        raise EvaluationError(f"--stride is {stride}; this model scores at most {count(most, 'byte')} of a window")
    if mode is Mode.memory:
        if not isinstance(model, TransformerXL) or not model.memory_length:
            raise EvaluationError(f"mode {mode} is for a Transformer-XL with model.memory_length; this has none")
        if stride not in (None, length):
            raise EvaluationError(f"--stride is {stride}; mode {mode} takes no stride: windows follow each other")
        return evaluate_with_memory(model, corpus, rows, group_of, progress)
    nats_of = scorer(model)
    if mode.is_strided:
        if not isinstance(model, Megabyte):
            raise EvaluationError(f"mode {mode} is for MEGABYTE; this model has no patches")
        nats_of = strided(nats_of, model.patch_size)
    return evaluate(nats_of, corpus, length, rows, group_of, progress, stride or stride_of(model, mode))


def stride_of(model: ByteModel, mode: Mode = Mode.windows) -> int:
    """Bytes that a mode scores at the end of a full window: all that the model scores there, or half a window at most.

    That of `windows` is the largest stride at which the model scores every byte.
    """
    scored = len(range(model.sequence_length)[model.scored(model.sequence_length)])
    return min(scored, -(-model.sequence_length // 2)) if mode.slides else scored


def strided(nats_of: Callable[[Ids], Tensor], patch_size: int) -> Callable[[Ids], Tensor]:
    """MEGABYTE's strided inference (section 2.3.3): a second pass over the window less its first P/2 bytes.

    Each pass keeps the first halves of its patches, where predictions are best. The paper leaves the border open. Here
    the window's first patch keeps the base pass's second half as well, which the shifted pass would predict from
    nothing; the second halves of all later patches come from the shifted pass.

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
