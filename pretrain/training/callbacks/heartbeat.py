"""Heartbeats of steps, so that a supervisor notices a rank that hangs."""

from pretrain.training.callbacks.base import Callback
from pretrain.training.run import TrainingRun


class HeartbeatCallback(Callback):
    """Reports each step, and the end of the rank. Validation and checkpoint report their own phases."""

    def before_step(self, run: TrainingRun) -> None:
        """Report the step that begins."""
        run.heartbeat.beat("step", run.step)

    def on_end(self, run: TrainingRun, status: str) -> None:
        """Report the end; a rank that fails leaves its last phase, which says where it failed. A rewind is no end."""
        if status != "FAILED" and not run.health.is_rewinding:
            run.heartbeat.beat("end", run.step)
