"""Schema of the config: a typed tree of nodes, each defined next to the code that it configures."""

from contextlib import suppress
from typing import Any, Self

from pydantic import BaseModel, model_validator

from byteloom.core.text import count
from byteloom.core.validation import Fault, Mismatch, MismatchError
from data_pipeline.stream.loader import LoaderConfig
from data_pipeline.stream.mixture import MOST_SEQUENCES
from data_pipeline.stream.reading import DataConfig
from launchers.local import LaunchConfig
from launchers.supervision.plan import SuperviseConfig
from pretrain.checkpoint import CheckpointConfig
from pretrain.config.recipe_yaml import as_yaml
from pretrain.engines import EngineConfig, optimizer_mismatch
from pretrain.estimate.activations import on_meta
from pretrain.evaluation.config import ValidationConfig
from pretrain.models import (
    FamilyError,
    ModelConfig,
    all_families,
    carries_memory,
    default_family,
    form_of,
    multi_byte_of,
    row_parts,
)
from pretrain.models.finetune import FinetuneConfig, FinetuneError, unfrozen_layers
from pretrain.models.patching.frozen import FrozenModelError
from pretrain.models.scaling import ScalingError
from pretrain.objectives import Form, ObjectiveConfig, Visibility
from pretrain.optim import OptimizerConfig, optimizer_warnings, schedule_mismatch
from pretrain.optim.scaling import base_config
from pretrain.tracking import TrackingConfig
from pretrain.training.callbacks import CallbackNodes
from pretrain.training.config import DiagnosticsConfig, ProfileConfig, ReportConfig, TrainConfig
from pretrain.training.health.config import HealthConfig
from pretrain.training.run_folder import RunConfig
from pretrain.training.sampling import SamplesConfig
from pretrain.training.weights import InitializeConfig


class Config(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Config of a run."""

    run: RunConfig
    data: DataConfig
    loader: LoaderConfig = LoaderConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    model: ModelConfig
    initialize: InitializeConfig = InitializeConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    health: HealthConfig = HealthConfig()
    tracking: TrackingConfig = TrackingConfig()
    launch: LaunchConfig = LaunchConfig()
    supervise: SuperviseConfig = SuperviseConfig()
    profile: ProfileConfig = ProfileConfig()
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
    report: ReportConfig = ReportConfig()
    samples: SamplesConfig = SamplesConfig()
    callbacks: CallbackNodes = {}
    """Callbacks of other packages, each by its name with its own fields."""

    @model_validator(mode="after")
    def _fields_go_together(self) -> Self:
        checked = (
            self._memory_without_rows(),
            self._documents_without_separators(),
            optimizer_mismatch(self.engine, self.optimizer),
            schedule_mismatch(self.optimizer.schedule, self.train.steps),
            self._too_many_sequences(),
            self._context_without_parts(),
            self._objective_without_model(),
            self._base_without_model(),
            self._samples_without_checkpoints(),
            self._finetune_without_model(),
            self._entropies_of_other_rows(),
        )
        if found := [mismatch for mismatch in checked if mismatch]:
            raise MismatchError(found)
        return self

    def _memory_without_rows(self) -> Mismatch | None:
        if not carries_memory(self.model):
            return None
        if self.data.mixture or self.data.packing == "document":
            return Mismatch(
                "model.memory_length needs rows that continue in the next batch, and rows of a data.mixture or of "
                "data.packing document do not; set it to 0, or read one corpus of concatenated documents",
                ("model.memory_length", "data.mixture", "data.packing"),
            )
        if self.data.lanes != self.train.global_batch:
            return Mismatch(
                f"model.memory_length needs rows that continue in the next batch, so data.lanes ({self.data.lanes}) "
                f"must equal train.global_batch ({self.train.global_batch})",
                ("data.lanes", "train.global_batch", "model.memory_length"),
            )
        return None

    def _documents_without_separators(self) -> Mismatch | None:
        if getattr(self.model, "attention_across_documents", True):
            return None
        for name, source in self.data.sources().items():
            if source.packing == "concatenate" and not source.separate_documents:
                field = f"data.mixture.{name}.separate_documents" if self.data.mixture else "data.separate_documents"
                return Mismatch(
                    f"model.attention_across_documents false stops attention at separators, and {field} false writes "
                    f"none; set {field} to true",
                    ("model.attention_across_documents", field),
                )
        return None

    def _too_many_sequences(self) -> Mismatch | None:
        sequences = self.train.steps * self.train.global_batch
        if sequences <= MOST_SEQUENCES:
            return None
        return Mismatch(
            f"train.steps ({self.train.steps}) times train.global_batch ({self.train.global_batch}) is "
            f"{sequences:.3g} sequences; a run can read {MOST_SEQUENCES:,} at most",
            ("train.steps", "train.global_batch"),
        )

    def _context_without_parts(self) -> Mismatch | None:
        context, name, parts = self.engine.context, self.model.family, row_parts(self.model)
        if context == 1:
            return None
        if parts is None:
            *others, last = [name for name, family in all_families().items() if family.row_parts is not None]
            return Mismatch(
                f"engine.context cuts rows over ranks, which {', '.join(others)} and {last} support, not {name}; set "
                "it to 1",
                ("engine.context", "model.family"),
            )
        if parts % context:
            return Mismatch(
                f"engine.context ({context}) does not divide the {count(parts, 'part')} into which ranks can cut a row "
                f"of this {name} model",
                ("engine.context", "model.sequence_length"),
            )
        if multi_byte_of(self.model) is not None:
            return Mismatch(
                "engine.context cuts rows over ranks, and the heads of model.multi_byte predict bytes beyond a part; "
                "set engine.context to 1 or model.multi_byte to null",
                ("engine.context", "model.multi_byte"),
            )
        return None

    def _objective_without_model(self) -> Mismatch | None:
        try:
            form = form_of(self.model, self.objective)
        except FamilyError as error:
            return Mismatch(str(error), ("objective.name", "model.family"))
        if self.samples.every and form.visibility is Visibility.bidirectional:
            return Mismatch(
                f"samples.every is {self.samples.every}, and a model of objective.name {self.objective.name} does not "
                "generate; set it to 0",
                ("samples.every", "objective.name"),
            )
        if self.objective.entry.reads_pairs and (mismatch := self._rows_without_pairs() or self._hidden_source(form)):
            return mismatch
        if self.engine.context > 1 and self.objective.name != "causal":
            return Mismatch(
                f"engine.context cuts rows over ranks, which only objective.name causal supports, not "
                f"{self.objective.name}; set it to 1",
                ("engine.context", "objective.name"),
            )
        return None

    def _hidden_source(self, form: Form) -> Mismatch | None:
        if form.visibility is not Visibility.causal:
            return None
        if not getattr(self.model, "attention_across_documents", True):
            return Mismatch(
                "model.attention_across_documents false stops attention at separators, and one stands between the "
                f"source and the target of objective.name {self.objective.name}; set it to true",
                ("model.attention_across_documents", "objective.name"),
            )
        if not getattr(self.model, "attends_across_documents", True):
            return Mismatch(
                f"attention of a {self.model.family} stops at separators, and one stands between the source and the "
                f"target of objective.name {self.objective.name}; take another family",
                ("model.family", "objective.name"),
            )
        return None

    def _base_without_model(self) -> Mismatch | None:
        if self.optimizer.scaling == "mup":
            try:
                base_config(self.model, self.optimizer)
            except ScalingError as error:
                return Mismatch(str(error), ("optimizer.base", "model"))
        return None

    def _rows_without_pairs(self) -> Mismatch | None:
        for name, source in self.data.sources().items():
            prefix = f"data.mixture.{name}" if self.data.mixture else "data"
            for field, needed in (("packing", "document"), ("documents", "cut"), ("separate_documents", True)):
                if getattr(source, field) != needed:
                    value = str(needed).lower()
                    return Mismatch(
                        f"objective.name {self.objective.name} reads a pair in each row; set {prefix}.{field} to "
                        f"{value}",
                        (f"{prefix}.{field}", "objective.name"),
                    )
        return None

    def _samples_without_checkpoints(self) -> Mismatch | None:
        every, of_checkpoints = self.samples.every, self.checkpoint.every
        try:
            is_encoder = form_of(self.model, self.objective).visibility is Visibility.bidirectional
        except FamilyError:  # `_objective_without_model` reports it
            is_encoder = False
        if every and is_encoder:
            return Mismatch(
                f"objective.name {self.objective.name} predicts no next byte, so there are no samples; set "
                "samples.every to 0",
                ("samples.every", "objective.name"),
            )
        if every % of_checkpoints == 0:
            return None
        return Mismatch(
            f"samples.every ({every}) is not a multiple of checkpoint.every ({of_checkpoints}), and samples come from "
            f"checkpoints; set it to {max(1, round(every / of_checkpoints)) * of_checkpoints}",
            ("samples.every", "checkpoint.every"),
        )

    def _entropies_of_other_rows(self) -> Mismatch | None:
        patcher = getattr(self.model, "patcher", None)
        if getattr(patcher, "entropies", None) != "corpus" or self.objective.entry.show is None:
            return None
        return Mismatch(
            f"the entropies beside a corpus are those of its rows, and objective.name {self.objective.name} changes "
            "them; set model.patcher.entropies to inline",
            ("model.patcher.entropies", "objective.name"),
        )

    def _finetune_without_model(self) -> Mismatch | None:
        if not self.finetune.is_used:
            return None
        if self.finetune.adapters.layers and self.initialize.moments:
            return Mismatch(
                "initialize.moments has no moments of new adapters; set it to false, or continue a run of adapters by "
                "`byteloom branch`",
                ("initialize.moments", "finetune.adapters.layers"),
            )
        if self.finetune.adapters.layers and self.optimizer.scaling == "mup":
            return Mismatch(
                "optimizer.scaling mup has no rules for adapters; set it to standard, or train the weights themselves",
                ("optimizer.scaling", "finetune.adapters.layers"),
            )
        try:
            on_meta(self.model, self.finetune)
        except FinetuneError as error:
            return Mismatch(str(error), (f"finetune.{error.field}",))
        except FrozenModelError:
            pass  # the export is gone, but the run may have a copy
        except (RuntimeError, OverflowError):
            pass  # others report sizes that torch cannot count
        return None

    def warnings(self) -> list[Fault]:
        """Return values that are valid but most often a mistake."""
        train, found = self.train, optimizer_warnings(self.optimizer)
        if train.micro_batch > train.global_batch:
            text = f"train.micro_batch ({train.micro_batch}) is more than train.global_batch ({train.global_batch})"
            found.append(Fault("train.micro_batch", f"{text}, so a step is one pass over the global batch"))
        return [*found, *self._no_checkpoint_before_decay(), *self._finetune_warnings()]

    def _finetune_warnings(self) -> list[Fault]:
        found, section = list[Fault](), self.finetune
        if section.is_used and self.initialize.weights is None:
            text = "finetune is set, and initialize.weights names no trained weights, so first values are frozen"
            found.append(Fault("initialize.weights", f"{text}; name a run, a checkpoint or an export"))
        with suppress(FrozenModelError):  # the start reports it, unless the run has a copy
            if section.adapters.layers and (unfrozen := unfrozen_layers(on_meta(self.model, self.finetune))):
                text = f"{unfrozen[0]} has an adapter and is trained itself too; freeze it by finetune.freeze"
                found.append(Fault("finetune.freeze", text))
        return found

    def _no_checkpoint_before_decay(self) -> list[Fault]:
        """Return a hint if a finished run has no checkpoint from which `byteloom branch` could decay again."""
        schedule, steps, every = self.optimizer.schedule, self.train.steps, self.checkpoint.every
        if schedule.shape != "wsd":
            return []
        begin = int(steps - schedule.decay_length(steps))
        if begin <= schedule.warmup_steps or self.checkpoint.oldest_kept(steps) <= begin:
            return []
        best = begin // every * every
        advice = f"set checkpoint.keep_every, such as {best}" if best else f"set checkpoint.every to at most {begin}"
        return [
            Fault(
                "checkpoint.keep_every",
                f"the learning rate decays after step {begin}, and the run keeps no checkpoint up to that step, "
                f"so `byteloom branch` cannot decay again from there; {advice}",
            )
        ]

    def as_tree(self) -> dict[str, Any]:
        """Return the whole tree as JSON values."""
        return self.model_dump(mode="json")

    def as_yaml(self) -> str:
        """Return the whole tree as a recipe that loads to the same config."""
        return as_yaml(self.as_tree())


SCHEMA_TITLE = "Byteloom recipe"
"""Title of the JSON schema, by which its files are recognized."""


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes, for editors."""
    schema = Config.model_json_schema()
    for name, family in all_families().items():
        if name != default_family():
            schema["$defs"][family.config.__name__].setdefault("required", []).append("family")
    return {**schema, "title": SCHEMA_TITLE}
