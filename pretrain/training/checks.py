"""Checks that refuse a start: the recipe must fit the other ranks, the corpora, the run folder and the checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from byteloom.core.provenance import changes
from byteloom.core.text import count
from data_pipeline.stream.byte_stream import ByteStream
from pretrain.checkpoint import CheckpointError, Metadata
from pretrain.distributed.world import World
from pretrain.training.config import TrainingRecipe
from pretrain.training.run import TrainingError
from pretrain.training.weights import model_changes


def check_same_recipe(recipe: TrainingRecipe, world: World) -> None:
    """Check that all ranks have the same recipe.

    Raises:
        TrainingError: another rank was started with another recipe.
    """
    trees = world.gather(recipe.as_tree())
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


def check_same_run(folder: Path, began: Mapping[str, Any], recipe: TrainingRecipe, fingerprint: str) -> None:
    """Check that a start has the model and the stream of bytes that its run folder began with.

    Args:
        folder: of the run.
        began: the run's identity; see `RunFolder.identity`.
        recipe: of the start.
        fingerprint: of the stream that the start would read.

    Raises:
        CheckpointError: it has others.
    """
    if differences := model_changes(began["model"], recipe.model):
        raise CheckpointError(
            f"{folder} has a run of another model ({'; '.join(differences)}); "
            "restore the old model, or choose another run.name"
        )
    if began["fingerprint"] != fingerprint:
        why = "; ".join(changes({"data": began["data"]}, {"data": recipe.as_tree()["data"]}))
        raise CheckpointError(
            f"{folder} has a run that reads other bytes ({why or 'the content of a corpus changed'}); "
            "restore the old data, or choose another run.name"
        )


def check_resumes(checkpoint: Metadata, recipe: TrainingRecipe, fingerprint: str) -> None:
    """Check that a recipe can continue from a checkpoint.

    Raises:
        CheckpointError: the checkpoint belongs to another stream of bytes, which a new run folder does not know; or to
            another optimizer. Moments are one optimizer's; its rates and decays may change.
    """
    if checkpoint.state["fingerprint"] != fingerprint:
        raise CheckpointError(
            f"{checkpoint.folder} belongs to a run that reads other bytes; restore the old data, or choose another "
            "run.name"
        )
    then, now = checkpoint.state["config"]["optimizer"]["name"], recipe.optimizer.name
    if then != now:
        raise CheckpointError(
            f"{checkpoint.folder} has the moments of optimizer.name={then}, not of {now}; set {then} again, or choose "
            "another run.name"
        )
