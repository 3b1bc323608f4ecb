"""State of a run in the process of one rank, which the loop and its callbacks share."""

from dataclasses import dataclass, field
from typing import Any

from byteloom.core.errors import CorrectableError
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.stream.loader import Loader
from data_pipeline.stream.reading import Reading
from launchers.supervision.heartbeat import Heartbeat
from pretrain.checkpoint import CheckpointStore, Metadata
from pretrain.checkpoint.homes.fence import Fence
from pretrain.distributed.world import World
from pretrain.engines import Engine
from pretrain.models import ByteModel
from pretrain.tracking import Recorder
from pretrain.training.config import TrainingRecipe
from pretrain.training.health.monitor import Monitor
from pretrain.training.meter import Meter
from pretrain.training.run_folder import RunFolder
from pretrain.training.stop import StopRequest


class TrainingError(CorrectableError):
    """A run cannot continue."""


@dataclass
class TrainingRun:
    """A start of a run, ready for its next step."""

    recipe: TrainingRecipe
    world: World
    folder: RunFolder
    stop: StopRequest
    fence: Fence
    heartbeat: Heartbeat
    identity: str
    """Identity of the run, the same in every start."""
    first_values: int
    """Version of the generator of first values."""
    ancestry: list[dict[str, Any]]
    """Fields of each Ancestor of the run, oldest first; see ancestry.py."""
    lineage: list[dict[str, Any]]
    """Fields of each of the Weights that the run descends from, oldest first; see lineage.py."""
    fingerprint: str
    """Digest of the stream of bytes that the run reads."""
    precision: str
    """Precision of the passes."""
    model: ByteModel
    """Model whose parameters the engine holds, in its own form; read values through `engine`."""
    engine: Engine
    store: CheckpointStore
    reading: Reading
    """Data of the run, and the record of what it has read."""
    loader: Loader
    """Batches of this rank, from the next step on."""
    validation: dict[str, Corpus]
    """Validation corpora by name; the name of a single one is empty."""
    checkpoint: Metadata | None
    """Checkpoint that this start resumes from; None for a start without one."""
    health: Monitor
    """Statistics of recent steps, and the events of bad batches."""
    meter: Meter
    recorder: Recorder | None
    """Journal and trackers; None on every rank but the first."""
    has_diverged: bool = False
    """Whether the gradient of the next batch is not finite."""
    unlogged: dict[str, float] = field(default_factory=dict)
    """Numbers of a step whose validation a stop cut short. They wait in the checkpoint for the next start."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.reading.record.step

    @property
    def steps_left(self) -> int:
        """Optimizer steps that the run has still to do."""
        return self.recipe.train.steps - self.step

    @property
    def is_done(self) -> bool:
        """Whether all steps of the run are done."""
        return self.steps_left <= 0
