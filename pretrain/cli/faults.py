"""Errors that a user can correct."""

from data_pipeline.errors import CorpusError
from launchers.slurm.presets import ClusterError
from launchers.slurm.scheduler import SchedulerError
from pretrain.checkpoint import CheckpointError
from pretrain.checkpoint.fence import FencedError
from pretrain.config.errors import ConfigError
from pretrain.distributed.world import WorldError
from pretrain.engines import EngineError
from pretrain.evaluation.generation import SamplingError
from pretrain.evaluation.scores import EvaluationError
from pretrain.models import FamilyError
from pretrain.training.loop import TrainingError
from pretrain.training.run_folder import RunFolderError

FAULTS = (
    ClusterError,
    CorpusError,
    ConfigError,
    CheckpointError,
    EngineError,
    EvaluationError,
    FamilyError,
    FencedError,
    RunFolderError,
    SamplingError,
    SchedulerError,
    TrainingError,
    WorldError,
)
"""Errors that commands print as one line, without a traceback."""
