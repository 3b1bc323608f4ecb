"""The config nodes that training reads: its own, and the recipe as a whole."""

from collections.abc import Mapping
from typing import Any, Protocol

from pydantic import BaseModel, Field

from byteloom.core.validation import Fault
from data_pipeline.stream.config import DataConfig
from data_pipeline.stream.loader import LoaderConfig
from pretrain.checkpoint import CheckpointConfig
from pretrain.engines import EngineConfig
from pretrain.evaluation.config import ValidationConfig
from pretrain.models import ModelConfig
from pretrain.optim.config import OptimizerConfig
from pretrain.tracking import TrackingConfig
from pretrain.training.run_folder import RunConfig
from pretrain.training.weights import InitializeConfig


class TrainConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """How long a run trains, and how much at a time."""

    steps: int = Field(ge=1)
    """Optimizer steps of the whole run."""
    global_batch: int = Field(ge=1)
    """Sequences of one optimizer step."""
    micro_batch: int = Field(ge=1)
    """Sequences of one forward and backward pass; gradients add up over the micro-batches of a global batch. Lower it
    when memory is short: the order of bytes does not depend on it."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the initial weights and of dropout."""


class ProfileConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Steps that torch's profiler records. Each rank writes its traces to a folder in RUN/profile."""

    start: int | None = Field(default=None, ge=1)
    """First step to record; null records none. The first steps of a start warm up and say little."""
    steps: int = Field(default=3, ge=1)
    """Steps to record. Each takes longer than others do, and writes a trace of some MB."""
    memory: bool = False
    """Record allocations too: by operator in the table, over time in the trace, and on CUDA in a snapshot with their
    stacks."""


class TrainingRecipe(Protocol):
    """Config tree, as training reads it."""

    @property
    def run(self) -> RunConfig:
        """Section `run`: name and root of the run."""

    @property
    def data(self) -> DataConfig:
        """Section `data`: corpora and their order."""

    @property
    def loader(self) -> LoaderConfig:
        """Section `loader`: reading ahead."""

    @property
    def model(self) -> ModelConfig:
        """Section `model`: model of any family."""

    @property
    def initialize(self) -> InitializeConfig:
        """Section `initialize`: initial weights."""

    @property
    def train(self) -> TrainConfig:
        """Section `train`: steps and batches."""

    @property
    def optimizer(self) -> OptimizerConfig:
        """Section `optimizer`: optimizer and schedule."""

    @property
    def engine(self) -> EngineConfig:
        """Section `engine`: engine, device and precision."""

    @property
    def validation(self) -> ValidationConfig:
        """Section `validation`: validation corpus."""

    @property
    def checkpoint(self) -> CheckpointConfig:
        """Section `checkpoint`: checkpoints."""

    @property
    def tracking(self) -> TrackingConfig:
        """Section `tracking`: MLflow and other trackers."""

    @property
    def profile(self) -> ProfileConfig:
        """Section `profile`: steps to record with the profiler."""

    @property
    def callbacks(self) -> Mapping[str, BaseModel]:
        """Section `callbacks`: config nodes of callbacks by name."""

    def as_tree(self) -> dict[str, Any]:
        """Return the whole tree as JSON values."""

    def as_yaml(self) -> str:
        """Return the whole tree as a recipe."""

    def warnings(self) -> list[Fault]:
        """Return values that are valid but most often a mistake."""
