"""Samples of the model during a run, where the recipe asks for them; see sampling/__init__.py."""

import json
import logging
from collections.abc import Mapping

from byteloom.core.storage.state_files import StateFileError
from byteloom.core.storage.step_folders import step_name
from pretrain.tracking.samples import as_text, has_samples, read_samples, remove_samples, sample_folders
from pretrain.training.callbacks.base import Callback
from pretrain.training.callbacks.side_process import SideProcess
from pretrain.training.run import TrainingRun
from pretrain.training.sampling import SamplesConfig

log = logging.getLogger(__name__)

LAST_SECONDS = 60.0
"""Longest wait for the last samples of a start."""
HURRIED_SECONDS = 5.0
"""The same, after a request to stop or a fault. The next start writes the samples that are missing."""
LOGGED_CHARACTERS = 400
"""Longest continuation in a line of the log. RUN/samples has all of it."""
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
"""Environment of the process that decodes: no GPU, and one thread."""


class SamplesCallback(Callback):
    """Has samples written from the checkpoints of every `samples.every` steps, and from the last one.

    Only the first rank acts. While the samples of a step are being written, those of the next due step are skipped.
    """

    def __init__(self, config: SamplesConfig) -> None:
        self._every = config.every
        self._writer = SideProcess("samples were not written")
        self._step = 0
        """Step whose samples are being written."""

    def on_start(self, run: TrainingRun) -> None:
        """Drop the samples of steps that this start repeats, as the journal does. Write those that are missing."""
        if not self._acts(run):
            return
        for folder in sample_folders(run.folder.samples, after=run.step):
            remove_samples(folder)
        if run.checkpoint is not None and self._is_due(run):
            self._begin(run)

    def before_step(self, run: TrainingRun) -> None:
        """Log the samples that were written."""
        if self._step and not self._writer.is_running:
            self._log_result(run)

    def on_numbers(self, run: TrainingRun, numbers: Mapping[str, float]) -> None:
        """Have the samples written where the step is due. The process waits for the checkpoint to be on disk."""
        if self._acts(run) and run.step and not run.is_done and self._is_due(run):
            self._begin(run)

    def on_end(self, run: TrainingRun, status: str) -> None:
        """Wait for the samples, and have those of the last step written."""
        if not self._acts(run) or not run.fence.holds:
            return
        limit = LAST_SECONDS if status == "FINISHED" and run.stop.signal is None else HURRIED_SECONDS
        self._writer.wait(limit)
        self._log_result(run)
        if status == "FINISHED" and self._is_due(run):
            self._begin(run, is_last=True)
            self._writer.wait(limit)
            self._log_result(run)

    def _acts(self, run: TrainingRun) -> bool:
        return self._every > 0 and run.world.is_first

    def _is_due(self, run: TrainingRun) -> bool:
        return (run.step % self._every == 0 or run.is_done) and not has_samples(run.folder.samples, run.step)

    def _begin(self, run: TrainingRun, *, is_last: bool = False) -> None:
        """Start the process, unless it runs. The last one waits for nothing and has normal priority."""
        if self._step:
            self._log_result(run)
        if self._writer.is_running:
            log.info("no samples of step %d: those of step %d are still being written", run.step, self._step)
            return
        arguments = ("samples", str(run.folder.path), "--step", str(run.step), *(() if is_last else ("--beside",)))
        if self._writer.begin(*arguments, environment=ENVIRONMENT):
            self._step = run.step

    def _log_result(self, run: TrainingRun) -> None:
        if self._writer.is_running:
            return
        step, self._step = self._step, 0
        if not self._writer.take_result():
            return
        try:
            found = read_samples(folder := run.folder.samples / step_name(step))
        except (StateFileError, FileNotFoundError) as error:  # training continues
            log.warning("samples of step %d are not in this log: %s", step, error)
            return
        for sample in found.samples:
            if sample.file is not None:
                log.info("step %d, %s: %s", step, sample.source, folder / sample.file)
                continue
            prompt, text = as_text(sample.prompt), as_text(sample.continuation)
            shown = text if len(text) <= LOGGED_CHARACTERS else f"{text[:LOGGED_CHARACTERS]}…"
            log.info("step %d, %s: %s continues %s", step, sample.source, _quoted(prompt), _quoted(shown))


def _quoted(text: str) -> str:
    """Return a text on one line."""
    return json.dumps(text, ensure_ascii=False)
