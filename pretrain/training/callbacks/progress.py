"""Progress line of a run."""

from collections.abc import Mapping
from contextlib import ExitStack

from pretrain.terminal.console import display
from pretrain.terminal.progress import TrainingProgress
from pretrain.training.callbacks.base import Callback
from pretrain.training.run import TrainingRun


class ProgressCallback(Callback):
    """Shows the first step as work of its own, since it may compile, and then the numbers of each step."""

    def __init__(self) -> None:
        self._line_shown = ExitStack()
        self._first_step_shown = ExitStack()
        self._line: TrainingProgress | None = None
        self._is_first_step = True

    def on_start(self, run: TrainingRun) -> None:
        """Show the line."""
        self._line = self._line_shown.enter_context(TrainingProgress(display, run.recipe.train.steps, run.step))

    def before_step(self, run: TrainingRun) -> None:
        """Show the first step."""
        if self._is_first_step:
            self._is_first_step = False
            compiling = ", compiling the blocks" if run.recipe.engine.compile else ""
            self._first_step_shown.enter_context(display.phase(f"the first step{compiling}"))

    def after_step(self, run: TrainingRun, numbers: Mapping[str, float]) -> None:
        """Show the numbers."""
        self._first_step_shown.close()
        if self._line is not None:
            self._line.update(run.step, numbers, run.meter.seconds_a_step * run.steps_left)

    def on_stop(self, run: TrainingRun) -> None:
        """Hide a first step that did not end."""
        self._first_step_shown.close()

    def on_end(self, run: TrainingRun, status: str) -> None:
        """Hide all."""
        self._first_step_shown.close()
        self._line_shown.close()
