"""Checkpoints: every `checkpoint.every` steps, and after the last step of a start."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from byteloom.core.provenance import environment
from data_pipeline.media import CARD_FIELD, common_card
from data_pipeline.stream.record import merged
from pretrain.checkpoint import CheckpointError
from pretrain.terminal.console import display
from pretrain.training.ancestry import ANCESTRY
from pretrain.training.callbacks.base import Callback
from pretrain.training.lineage import LINEAGE
from pretrain.training.run import TrainingRun
from pretrain.training.run_folder import STARTED_IN


class CheckpointCallback(Callback):
    """Saves a run. A save that fails is logged, and tried again at the next one; only the last save must succeed."""

    def __init__(self) -> None:
        self._saved_step = 0
        """Step of the newest checkpoint that is on disk."""
        self._begun_step = 0
        """Step of the newest checkpoint that was begun."""

    def on_start(self, run: TrainingRun) -> None:
        """Note the step that needs no save."""
        self._saved_step = self._begun_step = run.step

    def on_numbers(self, run: TrainingRun, numbers: Mapping[str, float]) -> None:
        """Begin a save where the step is due."""
        if run.step == self._begun_step or run.step % run.recipe.checkpoint.every:
            return
        with contextlib.suppress(CheckpointError):  # it is logged; the run continues, and tries again
            self._finish(run)
        if run.store.not_finite:
            return  # no rank gets the next batch
        with contextlib.suppress(CheckpointError):
            self._save(run)

    def on_stop(self, run: TrainingRun) -> None:
        """Leave no step unsaved. What an earlier save could not write is tried again.

        A run that has diverged, or whose last save found values that are not finite, leaves a post-mortem. A run that
        is about to rewind leaves nothing.

        Raises:
            CheckpointError: the save failed, or the values are not finite.
        """
        with contextlib.suppress(CheckpointError):  # it is logged
            self._finish(run)
        if run.health.is_rewinding:
            return
        if run.step != self._saved_step and not run.store.not_finite:
            self._save(run)
            self._finish(run)
        if not run.has_diverged:  # a diverged run logs that instead
            run.store.check_finite()

    def _save(self, run: TrainingRun) -> None:
        run.heartbeat.beat("checkpoint", run.step)
        run.world.on_first(lambda: _check_fence(run))
        if run.recorder is not None:
            run.recorder.journal.sync()  # a checkpoint on disk has its numbers on disk
        state: dict[str, Any] = {
            "run": run.identity,
            "generation": run.fence.generation,
            "first_values": run.first_values,
            "reading": merged(run.world.gather(run.reading.state())),
            "fingerprint": run.fingerprint,
            "counters": run.engine.counters(),
            "unlogged": run.unlogged,
            "health": run.health.state(run.step),
            "config": run.recipe.as_tree(),
            "precision": run.precision,
            "environment": environment(),
            STARTED_IN: str(Path.cwd()),
        }
        if run.ancestry:
            state[ANCESTRY] = run.ancestry
        if run.lineage:
            state[LINEAGE] = run.lineage
        card = common_card(stream.corpus.card for stream in run.reading.mixture.streams.values())
        if card is not None:
            state[CARD_FIELD] = card.as_json()
        run.store.also_keep = run.health.kept_steps(run.step)
        run.store.begin(run.step, run.engine.owned_fragments(), state, is_post_mortem=run.has_diverged)
        self._begun_step = run.step
        if not run.recipe.checkpoint.asynchronous:
            self._finish(run)

    def _finish(self, run: TrainingRun) -> None:
        """Wait for the save under way, if there is one.

        Raises:
            CheckpointError: it failed.
        """
        run.heartbeat.beat("checkpoint", run.step)
        try:
            with display.phase(f"waiting for the checkpoint of step {self._begun_step} to be on disk"):
                run.store.finish()
        except CheckpointError:
            self._begun_step = self._saved_step
            raise
        self._saved_step = self._begun_step


def _check_fence(run: TrainingRun) -> None:
    with contextlib.suppress(OSError):  # a remote home that cannot be read: the save itself reports it
        run.fence.check_everywhere()
