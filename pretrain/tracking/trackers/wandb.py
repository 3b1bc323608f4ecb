"""Weights & Biases: a server, or files for `wandb sync`."""

import importlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from byteloom.core.packages import needed_by
from pretrain.tracking.base import RunDescription, Tracker, register_tracker
from pretrain.tracking.samples import SampleSet, as_text

FINISH_SECONDS = 60.0
"""Longest wait for uploads at the end of a start. `wandb sync` sends what is left."""
TIMEOUT_SECONDS = 30.0
"""Longest wait for an answer when the run is opened."""


class WandbConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Run on a Weights & Biases server. Needs the extra byteloom[wandb]; `wandb login` stores a key."""

    project: str = "byteloom"
    """Project of the run."""
    entity: str | None = None
    """User or team that owns the project; null is the default of the account."""
    mode: Literal["online", "offline"] = "online"
    """online: send numbers during training. offline: write them to RUN/wandb, for `wandb sync`."""


@register_tracker("wandb", WandbConfig)
class Wandb(Tracker):
    """Sends a run to Weights & Biases. The run has Byteloom's identity, so later starts continue it."""

    replaces_steps = False  # the server refuses steps before its last one

    def __init__(self, config: WandbConfig, run: RunDescription) -> None:
        self._row, self._time = run.taken_step + 1, 0.0
        """Row that is open, a step, and its time. Samples join it, because rows cannot be changed afterwards."""
        self._sampled_row = -1
        """Newest row that has samples."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # a training run contacts the server it was given
        with needed_by("tracking.trackers.wandb", "wandb"):
            self._wandb: Any = importlib.import_module("wandb")
        self._run = self._wandb.init(
            project=config.project,
            entity=config.entity,
            mode=config.mode,
            dir=run.folder,
            id=run.identity,
            name=run.name,
            resume="allow" if config.mode == "online" else None,
            config={**run.params, **{f"tags.{name}": value for name, value in run.tags.items()}},
            settings=self._wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                init_timeout=TIMEOUT_SECONDS,
                finish_timeout=FINISH_SECONDS,
                x_disable_stats=True,
            ),
        )

    def log(self, step: int, numbers: Mapping[str, float], time: float) -> None:
        """Send the numbers of a step, with its time."""
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        self._row, self._time = step, time
        self._run.log({"_timestamp": time, **finite}, step=step)

    def log_samples(self, found: SampleSet, folder: Path) -> None:
        """Send the samples of a step: a table of texts, pictures and sounds."""
        # A row holds a name once. Samples that arrive together have names of their own, so that none replaces another.
        group = "samples" if self._sampled_row != self._row else f"samples-{found.step}"
        self._sampled_row = self._row
        rows = [[sample.source, as_text(sample.prompt), as_text(sample.continuation)] for sample in found.samples]
        media = {
            f"{group}/{number}": self._media(folder / sample.file, sample.source)
            for number, sample in enumerate(found.samples)
            if sample.file is not None
        }
        table = self._wandb.Table(columns=["prompt of", "prompt", "continuation"], data=rows)
        row = {"_timestamp": self._time or found.time, f"{group}/step": found.step, f"{group}/text": table, **media}
        self._run.log(row, step=self._row)

    def close(self, status: str) -> None:
        """End the run, and wait for its uploads."""
        self._run.finish(exit_code=0 if status in ("FINISHED", "RUNNING") else 1)

    def _media(self, path: Path, caption: str) -> Any:
        """Return a picture or a sound as the library takes it."""
        if path.suffix == ".png":
            return self._wandb.Image(str(path), caption=caption)
        return self._wandb.Audio(str(path), caption=caption)
