"""Weights of a run, a checkpoint or an export, and new runs that begin with them.

RUN            its newest valid checkpoint ┐
CHECKPOINT     step-00001200/              ├─▶ Metadata ─▶ eval, generate, export
EXPORT         safetensors and a card      ┘           └─▶ InitialWeights: what fits a new run's model
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from byteloom.core.progress import Progress, ignore
from byteloom.core.provenance import changes
from byteloom.core.storage.locations import LocationText
from byteloom.core.storage.step_folders import MARKER, is_checkpoint_name, is_step_name
from data_pipeline.media import CARD_FIELD, MediaCard
from pretrain.checkpoint import CheckpointError, CheckpointStore, Location, Metadata, locate, verify
from pretrain.checkpoint.values import describe_not_finite, merged_counts
from pretrain.distributed.fragments import MEMORY, MODEL, fragment_name, split_name
from pretrain.distributed.world import ALONE, World
from pretrain.engines import Engine
from pretrain.models import ByteModel, ModelConfig, family, image_of, model_config
from pretrain.models.adapters import layer_of_adapter
from pretrain.models.finetune import finetune_of
from pretrain.objectives import ObjectiveConfig
from pretrain.training.run_folder import STARTED_IN, RunFolder, as_started
from pretrain.training.weights.exports import is_export, read_export
from pretrain.training.weights.frozen_models import with_copy
from pretrain.training.weights.merging import read_merged, weight_shapes


class InitializeConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Weights that a new run begins with, at step 0 of its own data and schedule.

    A run that has a checkpoint resumes from it and ignores this section.
    """

    weights: LocationText | None = None
    """Run, checkpoint or export to take the weights from. A run means its newest valid checkpoint. A run or a
    checkpoint may be a folder or a URL. Corpus, engine and number of ranks may differ. Null begins with first values,
    drawn by train.seed."""
    moments: bool = False
    """Take the optimizer's moments too, to try another schedule from there. They include the count of steps that made
    them. Without them the optimizer begins with empty moments."""
    partly: bool = False
    """Take only the parameters that fit, for another head, depth or context. They have the same name and shape. The
    others are logged, and begin with first values. Without it, weights of another model are refused."""


@dataclass(frozen=True)
class InitialWeights:
    """Weights that a new run takes from a checkpoint."""

    checkpoint: Metadata
    tensors: frozenset[str]
    """Names of the fragments that are taken."""
    optimizer_steps: int | None
    """Optimizer steps that made the moments; None if they are not taken."""
    differences: Sequence[str]
    """Differences between the two models, a line each: config fields, and parameters that are not taken."""

    def fill(self, engine: Engine, world: World) -> None:
        """Fill an engine that has first values. All ranks call it."""
        own = [fragment for fragment in engine.fragments() if fragment.name in self.tensors]
        read_merged(self.checkpoint, own, world=world)
        engine.restore({"optimizer_steps": self.optimizer_steps or 0})


def find_initial_weights(
    config: InitializeConfig,
    own: ModelConfig,
    model: ByteModel,
    optimizer: str,
    world: World = ALONE,
    progress: Progress = ignore,
) -> InitialWeights:
    """Return the initial weights that a config names. All ranks call it.

    Args:
        config: with weights named.
        own: model config of the run.
        model: of the run, while its parameters are whole.
        optimizer: name of the run's optimizer.
        world: ranks of the run; each verifies a part.
        progress: as of `find_checkpoint`.

    Raises:
        CheckpointError: the weights do not exist, or do not fit.
    """
    assert config.weights is not None
    checkpoint = find_checkpoint(config.weights, world, progress)
    differences = model_changes(checkpoint.state["config"]["model"], own, in_use=True)
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if layer_of_adapter(name) is None  # new adapters begin with first values
    }
    there = weight_shapes(checkpoint)
    fitting = {name for name, shape in shapes.items() if there.get(name) == shape}
    differences += [
        _difference(name, there.get(name), shapes.get(name))
        for name in [*shapes, *(there.keys() - shapes.keys())]
        if name not in fitting
    ]
    if differences and not config.partly:
        raise CheckpointError(
            f"{checkpoint.folder} belongs to another model ({_few(differences)}); "
            "set initialize.partly=true to load the parameters that fit"
        )
    if not fitting:
        raise CheckpointError(f"{checkpoint.folder} has no parameter that fits this model")
    if frozen := [name for name in shapes if name not in fitting and not model.get_parameter(name).requires_grad]:
        raise CheckpointError(
            f"{checkpoint.folder} has no {frozen[0]} that fits, so finetune.freeze would freeze first values; name it "
            "in finetune.train"
        )
    if not config.moments:
        return InitialWeights(checkpoint, frozenset(fragment_name(MODEL, name) for name in fitting), None, differences)
    _check_moments(checkpoint, optimizer)
    tensors = frozenset(
        fragment
        for fragment, (kind, name) in ((each, split_name(each)) for each in checkpoint.tensors)
        if kind != MEMORY and name in fitting
    )
    return InitialWeights(checkpoint, tensors, checkpoint.state["counters"]["optimizer_steps"], differences)


def _check_moments(checkpoint: Metadata, optimizer: str) -> None:
    """Check that a checkpoint has finite moments of an optimizer.

    Raises:
        CheckpointError: it has none, or those of another optimizer, or some that are not finite.
    """
    if "counters" not in checkpoint.state:
        raise CheckpointError(f"{checkpoint.folder} is an export, which has no moments; set initialize.moments=false")
    if finetune_of(checkpoint.state["config"]).is_used:
        raise CheckpointError(
            f"{checkpoint.folder} has the moments of a fine-tuning, which are those of some parameters alone; set "
            "initialize.moments=false, or continue it by `byteloom branch`"
        )
    name = checkpoint.state["config"]["optimizer"]["name"]
    if name != optimizer:
        raise CheckpointError(
            f"{checkpoint.folder} has the moments of optimizer.name={name}, not of {optimizer}; set "
            f"initialize.moments=false, or optimizer.name={name}"
        )
    if moments := {name: n for name, n in (checkpoint.not_finite or {}).items() if split_name(name)[0] != MODEL}:
        raise CheckpointError(
            f"{checkpoint.folder} has {describe_not_finite(moments)}; set initialize.moments=false, or name an earlier "
            "checkpoint"
        )


def store_of(run: Location, world: World = ALONE) -> CheckpointStore:
    """Return the checkpoints of a run for reading, by its folder or by their home."""
    if not isinstance(run, Path) or any(is_step_name(path.name) for path in run.glob("step-*")):
        return CheckpointStore(run, keep=None, world=world)
    folder = RunFolder(run)
    return CheckpointStore(folder.checkpoints, keep=None, world=world, run=folder.run_id())


def is_checkpoint(place: Location) -> bool:
    """Return whether a place is one checkpoint rather than a run."""
    return (place / MARKER).exists() if isinstance(place, Path) else is_checkpoint_name(place.name)


def find_checkpoint(text: str | Path, world: World = ALONE, progress: Progress = ignore) -> Metadata:
    """Return a verified checkpoint: the newest valid one of a run, one checkpoint, or an export.

    All ranks call it, and each verifies a part.

    Args:
        text: path or URL of the run, the checkpoint or the export.
        world: ranks that call it.
        progress: called with bytes verified and bytes in all, of this rank's part.

    Raises:
        CheckpointError: it does not exist, is not valid, or has weights that are not finite; on all ranks. Its moments
            may be not finite.
    """
    place = locate(text)
    if place == Path():
        place = Path.cwd()  # a checkpoint is found by the name of its folder, which Path() lacks
    folder = place if isinstance(place, Path) and is_export(place) else None
    if folder is None and not is_checkpoint(place):
        found = store_of(place, world).newest_valid(progress)
        if found is None:
            raise CheckpointError(f"{text} has no valid checkpoint; name a run with one, a checkpoint, or an export")
        return _as_started(found, place)
    checkpoint, fault = None, None
    try:
        checkpoint = read_export(folder) if folder else verify(place, world.rank, world.size, progress)
    except CheckpointError as error:
        fault = str(error)
    faults = [text for text in world.gather(fault) if text is not None]
    if faults:
        raise CheckpointError(faults[0])
    assert checkpoint is not None
    not_finite = merged_counts(world.gather(dict(checkpoint.not_finite or {})))
    if weights := {name: number for name, number in not_finite.items() if split_name(name)[0] == MODEL}:
        raise CheckpointError(f"{checkpoint.folder} has {describe_not_finite(weights)}; name an earlier checkpoint")
    return _as_started(replace(checkpoint, not_finite=not_finite), None)


def _as_started(checkpoint: Metadata, run: Location | None) -> Metadata:
    """Return a checkpoint whose recipe has paths that lead from here to what the run named.

    Args:
        checkpoint: its recipe has the paths as they were typed.
        run: where the checkpoint was looked for; None: the run that it lies in, if there is one.
    """
    state, recorded = checkpoint.state, checkpoint.state.get(STARTED_IN)
    if run is None and isinstance(checkpoint.folder, Path):
        run = checkpoint.folder.resolve().parents[1]
    known = run if isinstance(run, Path) and (run / "run.json").exists() else None
    if known is not None or recorded is not None:
        checkpoint = replace(checkpoint, state={**state, "config": as_started(state["config"], known, recorded)})
    return with_copy(checkpoint)


def trained_precision(checkpoint: Metadata) -> str:
    """Return the precision of the passes that made a checkpoint; the recipe's (maybe auto) where none is recorded."""
    return str(checkpoint.state.get("precision", checkpoint.state["config"]["engine"]["precision"]))


def trained_card(checkpoint: Metadata) -> MediaCard | None:
    """Return the layout of the documents that a checkpoint was trained on; None if they were no media, or differed.

    A model with positions of an image reads such images only, also where an earlier version trained it.

    Raises:
        CheckpointError: the card is damaged.
    """
    if CARD_FIELD not in checkpoint.state:
        if (image := image_of(model_config(checkpoint.state["config"]["model"]))) is None:
            return None
        height, width, channels = image
        return MediaCard("image", "u8", channels, width=width, height=height, scan="raster")
    try:
        return MediaCard.from_json(checkpoint.state[CARD_FIELD])
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.folder}: its card of media is damaged: {error}") from error


def trained_separators(checkpoint: Metadata) -> bool:
    """Return whether the model of a checkpoint was trained with a separator after each document."""
    data = checkpoint.state["config"]["data"]
    sources = (data.get("mixture") or {}).values() or [data]
    return any(source.get("separate_documents", True) for source in sources)


def model_changes(then: Mapping[str, Any], now: ModelConfig, *, in_use: bool = False) -> list[str]:
    """Return the differences between an earlier recipe's section `model` and a config, a line each.

    Args:
        then: section of the earlier recipe.
        now: the config.
        in_use: whether to ignore fields that no parameter depends on, besides those that do not change the function.
    """

    def compared(config: ModelConfig) -> dict[str, Any]:
        entry = family(config.family)
        ignored = entry.free_fields | entry.usage_fields if in_use else entry.free_fields
        return config.model_dump(mode="json", exclude=_nested(ignored))

    before, after = compared(model_config(then)), compared(now)
    return changes({"model": before}, {"model": after})


def _nested(fields: Iterable[str]) -> dict[str, Any]:
    """Return fields in the form in which pydantic excludes them, given their names: dropout, patcher.model."""
    found: dict[str, Any] = {}
    for name in fields:
        section, _, field = name.partition(".")
        found[section] = found.get(section, {}) | {field: True} if field else True
    return found


def _difference(name: str, there: tuple[int, ...] | None, here: tuple[int, ...] | None) -> str:
    """Return how a parameter differs between a checkpoint and this model, by its shapes; None where it is missing."""
    if there is None:
        return f"the checkpoint has no {name}"
    if here is None:
        return f"this model has no {name}"
    return f"{name} has shape {list(there)} in the checkpoint and {list(here)} in this model"


def _few(lines: Sequence[str]) -> str:
    more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
    return "; ".join(lines[:3]) + more


def trained_objective(checkpoint: Metadata) -> ObjectiveConfig:
    """Return the objective that trained a checkpoint. Earlier versions of Byteloom had causal alone."""
    return ObjectiveConfig.model_validate(checkpoint.state["config"].get("objective", {}))
