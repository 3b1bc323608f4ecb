"""Validation: the loss of corpora that are not trained on. It is in bits per byte if the objective is causal."""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from data_pipeline.corpus.corpus import Corpus
from pretrain.evaluation.beginning import Beginning
from pretrain.evaluation.evaluate import evaluate, share_of_rank
from pretrain.evaluation.modes import stride_of
from pretrain.evaluation.objective_scores import score_objective
from pretrain.evaluation.scores import Score
from pretrain.evaluation.window_entropies import scorer_of
from pretrain.models import form_of
from pretrain.terminal.console import display
from pretrain.terminal.losses import unit_of
from pretrain.terminal.progress import duration
from pretrain.training.agreement import Vote
from pretrain.training.callbacks.base import Callback
from pretrain.training.run import TrainingError, TrainingRun

log = logging.getLogger(__name__)


class ValidationCallback(Callback):
    """Validates a new run before its first step, every `validation.every` steps, and after the last step."""

    def __init__(self) -> None:
        self._is_owed = False

    def on_start(self, run: TrainingRun) -> None:
        """Note whether an earlier start was cut short while it validated."""
        self._is_owed = bool(run.unlogged)

    def measure(self, run: TrainingRun) -> dict[str, float]:
        """Return the loss of the validation corpora, of all together and of each, where the step is due.

        Raises:
            StoppedError: a rank was asked to stop; on all ranks.
            TrainingError: a rank cannot read a corpus, or there is nothing to score in it; on all ranks.
        """
        is_due = self._is_owed or run.is_done or run.step % run.recipe.validation.every == 0
        self._is_owed = False
        if not is_due or not run.validation:
            return {}
        vote, total, numbers = Vote(run.stop, run.world), Score(), dict[str, float]()
        metric = run.recipe.objective.metric
        for name, corpus in run.validation.items():
            score = _validate(run, vote, name, corpus)
            total.add(score)
            if name:
                numbers[f"{name}/{metric}"] = score.bits_per_byte
        return {metric: total.bits_per_byte} | numbers


def _validate(run: TrainingRun, vote: Vote, name: str, corpus: Corpus) -> Score:
    """Return the score of a corpus. Each rank scores a part of it."""
    started, context = time.perf_counter(), run.recipe.engine.context
    run.heartbeat.beat("evaluation", run.step)
    with display.phase(f"validating {name}".strip(), corpus.raw_bytes) as phase:
        own = _own_score(
            run,
            corpus,
            progress=lambda done: phase.advance(done * run.world.size // context),  # other groups do about as many
            share=lambda batches: vote.agreed(share_of_rank(batches, run.world.rank, run.world.size, context)),
        )
    total = Score()
    for score in run.world.gather(asdict(own)):
        total.add(Score(**score))
    if not total.bytes:
        objective = run.recipe.objective
        raise TrainingError(
            f"validation corpus {name or run.recipe.validation.shards} has no {objective.entry.unit} to score for "
            f"objective.name {objective.name}; set validation.shards to another corpus, or leave it out"
        )
    log.info(
        "step %d: validation%s %.4f %s over %s bytes in %s",
        run.step,
        f" of {name}" if name else "",
        total.bits_per_byte,
        unit_of(run.recipe.objective.metric),
        f"{total.bytes:,}",
        duration(time.perf_counter() - started),
    )
    return total


def _own_score(
    run: TrainingRun, corpus: Corpus, *, progress: Callable[[int], None], share: Callable[[Any], Any]
) -> Score:
    """Return the score of this rank's part of a corpus."""
    recipe = run.recipe
    if recipe.objective.entry.show is not None:
        form, rows = form_of(recipe.model, recipe.objective), recipe.train.micro_batch
        return score_objective(
            run.engine.nats,
            corpus,
            recipe.objective,
            form,
            rows,
            length=recipe.model.sequence_length,
            scored=run.model.scored,
            progress=progress,
            share=share,
        )
    begin = recipe.validation.begin.resolved(recipe.data.model_dump(mode="json"))
    return evaluate(
        scorer_of(run.model, run.engine.nats, run.engine.device),
        corpus,
        recipe.model.sequence_length,
        recipe.train.micro_batch,
        progress=progress,
        stride=stride_of(run.model),
        after_separator=begin is Beginning.separator,
        share=share,
    ).total
