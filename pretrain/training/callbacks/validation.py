"""Validation: bits per byte of a corpus that is not trained on."""

import logging
import time
from dataclasses import asdict

from torch import Tensor

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.stream.rows import Ids
from pretrain.evaluation.evaluate import evaluate
from pretrain.evaluation.modes import stride_of
from pretrain.evaluation.scores import Score
from pretrain.terminal.console import display
from pretrain.terminal.progress import duration
from pretrain.training.callbacks.base import Callback
from pretrain.training.run import TrainingRun
from pretrain.training.stop import Vote

log = logging.getLogger(__name__)


class ValidationCallback(Callback):
    """Validates a new run before its first step, every `validation.every` steps, and after the last step."""

    def __init__(self) -> None:
        self._is_owed = False

    def on_start(self, run: TrainingRun) -> None:
        """Note whether an earlier start was cut short while it validated."""
        self._is_owed = bool(run.unlogged)

    def measure(self, run: TrainingRun) -> dict[str, float]:
        """Return the bits per byte of the validation corpus, where the step is due.

        Raises:
            StoppedError: a rank was asked to stop; on all ranks.
        """
        is_due = self._is_owed or run.is_done or run.step % run.recipe.validation.every == 0
        self._is_owed = False
        return {"bits_per_byte": _validate(run, run.validation)} if is_due and run.validation else {}


def _validate(run: TrainingRun, corpus: Corpus) -> float:
    """Return the bits per byte of a corpus. Each rank scores a part of it."""
    started = time.perf_counter()
    run.heartbeat.beat("evaluation", run.step)
    vote = Vote(run.stop, run.world)

    def nats_of(ids: Ids) -> Tensor:
        vote.check()
        return run.engine.nats(ids)

    with display.phase("validating", corpus.raw_bytes) as phase:
        part = evaluate(
            nats_of,
            corpus,
            run.recipe.model.sequence_length,
            run.recipe.train.micro_batch,
            progress=lambda done: phase.advance(done * run.world.size),  # other ranks do about as many
            stride=stride_of(run.model),
            rank=run.world.rank,
            world_size=run.world.size,
        )
    total = Score()
    for score in run.world.gather(asdict(part.total)):
        total.add(Score(**score))
    log.info(
        "step %d: validation %.4f bits/byte over %s bytes in %s",
        run.step,
        total.bits_per_byte,
        f"{total.bytes:,}",
        duration(time.perf_counter() - started),
    )
    return total.bits_per_byte
