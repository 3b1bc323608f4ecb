"""Numbers of each step for metrics.jsonl and the trackers."""

from collections.abc import Mapping

from pretrain.terminal.console import display
from pretrain.training.callbacks.base import Callback
from pretrain.training.run import TrainingRun


class TrackingCallback(Callback):
    """Logs the numbers of each step on the first rank."""

    def on_numbers(self, run: TrainingRun, numbers: Mapping[str, float]) -> None:
        """Log the numbers, unless a newer start has taken over."""
        if run.recorder is not None:
            run.fence.check()
            run.stop.stand_still_if_ending()
            run.recorder.log(run.step, numbers)

    def on_end(self, run: TrainingRun, status: str) -> None:
        """Deliver what is left."""
        if run.recorder is not None:
            with display.phase("delivering numbers to the trackers"):
                run.recorder.close(status, is_hurried=lambda: run.stop.signal is not None)
