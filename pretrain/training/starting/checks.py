"""Checks that refuse a start: the recipe must fit the other ranks, the corpora, the run folder and the checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from byteloom.core.faults import FaultClass
from byteloom.core.provenance import changes
from byteloom.core.text import count
from data_pipeline.stream.byte_stream import ByteStream
from data_pipeline.stream.config import ONLY_SOURCE
from data_pipeline.stream.mixture import fingerprint_of
from pretrain.checkpoint import CheckpointError, InvalidCheckpointError, Metadata
from pretrain.distributed.world import World
from pretrain.models.finetune import SECTION, finetune_of
from pretrain.training.config import TrainingRecipe
from pretrain.training.run import TrainingError
from pretrain.training.weights import model_changes, trained_objective
from pretrain.training.weights.frozen_models import COPY, with_place


def check_same_recipe(recipe: TrainingRecipe, world: World) -> None:
    """Check that all ranks have the same recipe. They may have a frozen model in different places.

    Raises:
        TrainingError: another rank was started with another recipe.
    """
    trees = world.gather(with_place(recipe.as_tree(), COPY))
    for rank, tree in enumerate(trees):
        if differences := changes(trees[0], tree):
            raise TrainingError(f"rank {rank} was started with another recipe than rank 0: {'; '.join(differences)}")


def check_lanes(streams: dict[str, ByteStream], global_batch: int) -> None:
    """Check that each row of a batch continues in the next one.

    Raises:
        TrainingError: a corpus is too short for as many lanes as a batch has rows.
    """
    for stream in streams.values():
        if stream.order.lanes != global_batch:
            raise TrainingError(
                f"{stream.corpus.location} has {count(stream.sequences_per_epoch, 'sequence')}, fewer than the "
                f"{global_batch} rows of a batch, and model.memory_length needs one for each row; lower "
                "train.global_batch and data.lanes, or set model.memory_length to 0"
            )


def check_images(streams: Mapping[str, ByteStream], image: tuple[int, int, int]) -> None:
    """Check that the documents are the images that a model with positions of an image needs.

    A corpus of raw bytes, or of an earlier version of Byteloom, has no card. It may hold such images.

    Args:
        streams: streams by source.
        image: height, width and channels of the image, in raster order.

    Raises:
        TrainingError: a corpus holds other documents.
    """
    height, width, channels = image
    for stream in streams.values():
        corpus = stream.corpus
        card = corpus.card
        if card is None:
            fits = not {"image", "binary"}.isdisjoint(corpus.modalities)
        else:
            is_raster = (card.kind, card.scan) == ("image", "raster")
            fits = is_raster and (card.height, card.width, card.channels) == image
        if not fits:
            raise TrainingError(
                f"{corpus.location} holds {card or ' and '.join(corpus.modalities)}, and model.positions: image needs "
                f"images of {width} x {height} pixels and {channels} channels in raster scan; prepare such images, or "
                "choose other positions"
            )


class BegunStream(NamedTuple):
    """Stream of bytes that a run began with."""

    fingerprint: str
    """Its fingerprint."""
    names: list[str]
    """Sources that the fingerprint covers; others may have been added since."""


def stream_of_identity(began: Mapping[str, Any]) -> BegunStream:
    """Return the stream of a run, given its identity; see `RunFolder.identity`."""
    return BegunStream(began["fingerprint"], list(began["data"].get("mixture") or [ONLY_SOURCE]))


def stream_of_state(state: Mapping[str, Any]) -> BegunStream:
    """Return the stream of a run, given the state in one of its checkpoints."""
    _, _, weights = state["reading"]["stages"][-1]  # of all sources that the run had
    return BegunStream(state["fingerprint"], list(weights))


def check_same_run(
    folder: Path, began: Mapping[str, Any], recipe: TrainingRecipe, streams: Mapping[str, ByteStream]
) -> None:
    """Check that a start has the model and the sources that its run folder began with. It may have more sources.

    Args:
        folder: of the run.
        began: the run's identity; see `RunFolder.identity`.
        recipe: of the start.
        streams: streams that the start would read, by source.

    Raises:
        CheckpointError: it has others.
    """
    if differences := model_changes(began["model"], recipe.model):
        raise CheckpointError(
            f"{folder} has a run of another model ({'; '.join(differences)}); "
            "restore the old model, or choose another run.name"
        )
    fingerprint, names = stream_of_identity(began)
    if fingerprint != fingerprint_of(streams, names):
        why = _data_changes(began["data"], recipe)
        raise _other_bytes(
            f"{folder} has a run that reads other bytes ({why or 'the content of a corpus changed'})", why
        )


def check_belongs(checkpoint: Metadata, recipe: TrainingRecipe) -> None:
    """Check that a checkpoint has the same model as the other checkpoints of its run.

    Raises:
        InvalidCheckpointError: it is not.
    """
    if differences := model_changes(checkpoint.state["config"]["model"], recipe.model):
        raise InvalidCheckpointError(f"{checkpoint.folder} belongs to another model ({'; '.join(differences)})")


def check_resumes(checkpoint: Metadata, recipe: TrainingRecipe, streams: Mapping[str, ByteStream]) -> None:
    """Check that a recipe can continue from a checkpoint. It may add sources, which the run then reads from a stage on.

    Raises:
        CheckpointError: the checkpoint belongs to another stream of bytes, which a new run folder does not know; to
            another objective; to a run that trains other parameters; or to another optimizer. Moments are one
            optimizer's; its rates and decays may change.
    """
    fingerprint, names = stream_of_state(checkpoint.state)
    if fingerprint != fingerprint_of(streams, names):
        why = _data_changes(checkpoint.state["config"]["data"], recipe)
        raise _other_bytes(f"{checkpoint.folder} belongs to a run that reads other bytes", why)
    if differences := changes(
        {"objective": trained_objective(checkpoint).model_dump(mode="json")},
        {"objective": recipe.objective.model_dump(mode="json")},
    ):
        raise CheckpointError(
            f"{checkpoint.folder} belongs to a run with another objective ({'; '.join(differences)}); restore the old "
            "one, or choose another run.name and set initialize.weights"
        )
    if differences := finetune_changes(checkpoint.state["config"], recipe.as_tree()):
        raise CheckpointError(
            f"{checkpoint.folder} belongs to a run that trains other parameters ({'; '.join(differences)}); restore "
            "the old section, or choose another run.name and set initialize.weights"
        )
    then, now = checkpoint.state["config"]["optimizer"]["name"], recipe.optimizer.name
    if then != now:
        raise CheckpointError(
            f"{checkpoint.folder} has the moments of optimizer.name={then}, not of {now}; set {then} again, or choose "
            "another run.name"
        )
    if differences := scaling_changes(checkpoint.state["config"], recipe.as_tree()):
        raise CheckpointError(
            f"{checkpoint.folder} belongs to a run with other scales ({'; '.join(differences)}); restore the old one, "
            "or choose another run.name"
        )


def scaling_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return how `optimizer.scaling` and its base differ in two recipes, a line each."""
    unscaled = {"scaling": "standard", "base": {}}  # as in earlier versions of Byteloom
    earlier, later = (
        {name: recipe["optimizer"].get(name, default) for name, default in unscaled.items()} for recipe in (then, now)
    )
    return changes({"optimizer": earlier}, {"optimizer": later})


def finetune_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return how the sections `finetune` of two recipes differ, a line each."""
    earlier, later = (finetune_of(recipe).model_dump(mode="json") for recipe in (then, now))
    return changes({SECTION: earlier}, {SECTION: later})


def _data_changes(then: Mapping[str, Any], recipe: TrainingRecipe) -> str:
    """Return how the data of a recipe differ from earlier ones; empty if they are the same."""
    return "; ".join(changes({"data": then}, {"data": recipe.as_tree()["data"]}))


def _other_bytes(words: str, data_changes: str) -> CheckpointError:
    """Return the error of a run that would read other bytes. With the same recipe, it is a fault of the data."""
    error = CheckpointError(f"{words}; restore the old data, or choose another run.name")
    error.fault = None if data_changes else FaultClass.DAMAGED
    return error
