"""The config nodes that training reads: its own, and the recipe as a whole."""

from collections.abc import Mapping
from typing import Any, Protocol, Self

from pydantic import BaseModel, Field

from byteloom.core.validation import Fault
from data_pipeline.stream.config import DataConfig
from data_pipeline.stream.loader import LoaderConfig
from launchers.supervision.plan import SuperviseConfig
from pretrain.checkpoint import CheckpointConfig
from pretrain.engines import EngineConfig
from pretrain.evaluation.config import ValidationConfig
from pretrain.models import ModelConfig
from pretrain.models.finetune import FinetuneConfig
from pretrain.objectives import ObjectiveConfig
from pretrain.optim.config import OptimizerConfig
from pretrain.tracking import TrackingConfig
from pretrain.training.health.config import HealthConfig
from pretrain.training.run_folder import RunConfig
from pretrain.training.sampling import SamplesConfig
from pretrain.training.weights import InitializeConfig


class TrainConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Length of a run and size of a step."""

    steps: int = Field(ge=1)
    """Optimizer steps of the whole run."""
    global_batch: int = Field(ge=1)
    """Sequences of one optimizer step."""
    micro_batch: int = Field(ge=1)
    """Sequences of one forward and backward pass. Gradients add up over the micro-batches of a global batch. Lower it
    when memory is short: the order of bytes does not depend on it."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the initial weights, of dropout, and of what the objective hides."""


class ProfileConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Steps that torch's profiler records. Each rank writes its traces to a folder in RUN/profile."""

    start: int | None = Field(default=None, ge=1)
    """First step to record; null records none. The first steps of a start warm up and say little."""
    steps: int = Field(default=3, ge=1)
    """Steps to record. Each takes longer than others do, and writes a trace of some MB."""
    memory: bool = False
    """Record allocations too. The table has them by operator, the trace over time, and on CUDA a snapshot has their
    stacks."""


class DiagnosticsConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Numbers about the gradient, beside its norm. They change no loss, and cost time in the steps that have them."""

    every: int = Field(default=0, ge=0)
    """Steps between measurements of norms by layer and gradient noise; 0: none.

    The norms are those of gradients and weights. The noise needs two micro-batches in a global batch, and
    `engine.context` 1.
    """


class ReportConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Page about the run, RUN/report.html, as `byteloom report` writes it."""

    every: int | None = Field(default=None, ge=1)
    """Steps between two refreshes of the page; null writes none. Another process writes it. It is also written at the
    end of each start, and is an artifact in MLflow."""


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
    def objective(self) -> ObjectiveConfig:
        """Section `objective`: what the model predicts."""

    @property
    def initialize(self) -> InitializeConfig:
        """Section `initialize`: initial weights."""

    @property
    def train(self) -> TrainConfig:
        """Section `train`: steps and batches."""

    @property
    def finetune(self) -> FinetuneConfig:
        """Section `finetune`: frozen parameters and adapters."""

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
    def health(self) -> HealthConfig:
        """Section `health`: bad batches."""

    @property
    def tracking(self) -> TrackingConfig:
        """Section `tracking`: MLflow and other trackers."""

    @property
    def supervise(self) -> SuperviseConfig:
        """Section `supervise`: ranks that hang, fail or are slow."""

    @property
    def profile(self) -> ProfileConfig:
        """Section `profile`: steps to record with the profiler."""

    @property
    def diagnostics(self) -> DiagnosticsConfig:
        """Section `diagnostics`: norms by layer and gradient noise."""

    @property
    def report(self) -> ReportConfig:
        """Section `report`: the page about the run."""

    @property
    def samples(self) -> SamplesConfig:
        """Section `samples`: what the model writes during training."""

    @property
    def callbacks(self) -> Mapping[str, BaseModel]:
        """Section `callbacks`: config nodes of callbacks by name."""

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with other sections, which are not checked."""

    def as_tree(self) -> dict[str, Any]:
        """Return the whole tree as JSON values."""

    def as_yaml(self) -> str:
        """Return the whole tree as a recipe."""

    def warnings(self) -> list[Fault]:
        """Return values that are valid but most often a mistake."""
