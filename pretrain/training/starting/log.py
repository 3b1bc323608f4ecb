"""Log of a start: its file, and the lines about the run before the first step."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from byteloom.core.provenance import changes, environment
from data_pipeline.stream.inspection.coverage import Coverage
from data_pipeline.stream.reading import Reading
from pretrain.checkpoint import Metadata
from pretrain.checkpoint.homes.fence import Fence, starts_noted_at
from pretrain.distributed.world import World
from pretrain.engines import Engine, choose_device
from pretrain.models import ByteModel, describe_attention
from pretrain.training.ancestry import ancestors_in, describe_ancestry
from pretrain.training.config import TrainingRecipe
from pretrain.training.run_folder import RunFolder, rollback_before
from pretrain.training.starting.schedule_changes import describe_extended_decay
from pretrain.training.weights import InitialWeights

log = logging.getLogger(__name__)


@contextmanager
def log_to(path: Path, fence: Fence) -> Iterator[None]:
    """Write what is logged to a file too, with the progress lines that a terminal does not show."""
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(lambda record: fence.holds)
    loggers = [logging.getLogger(name) for name in ("pretrain", "data_pipeline")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    except Exception:
        log.debug("the run cannot continue", exc_info=True)  # for the file; the terminal gets one line
        raise
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()


def log_first_line(recipe: TrainingRecipe, folder: RunFolder, world: World, model: ByteModel, precision: str) -> None:
    """Log the folder, the family and its parameters, the device and the engine."""
    trained = sum(parameter.numel() for parameter in model.trained_parameters().values())
    log.info(
        "training %s: %s, %s parameters%s, %s on %s, %s",
        folder.path,
        recipe.model.family,
        f"{model.parameter_count():,}",
        f" of which {trained:,} are trained" if recipe.finetune.is_used else "",
        precision,
        choose_device(recipe.engine.device, world.local_rank),
        f"{recipe.engine.name} of {world.size} ranks" if world.size > 1 else "one process",
    )


def log_facts(
    recipe: TrainingRecipe,
    engine: Engine,
    reading: Reading,
    coverage: Mapping[str, Coverage],
    checkpoint: Metadata | None,
    initial: InitialWeights | None,
) -> None:
    """Log what the run computes with, what it reads, and where it begins."""
    log.info("attention: %s", describe_attention(engine.device, engine.dtype))
    for name, stream in reading.mixture.streams.items():
        log.info(
            "%s: %s bytes, %s sequences of %s bytes per epoch; the run reads %.2f epochs; %s",
            f"{name}, {stream.corpus.location}" if recipe.data.mixture else stream.corpus.location,
            f"{stream.corpus.raw_bytes:,}",
            f"{stream.sequences_per_epoch:,}",
            f"{stream.sequence_length:,}",
            reading.mixture.epochs(reading.sequences_in_all(recipe.train.steps))[name],
            coverage[name],
        )
    if checkpoint is not None:
        log.info("resumes after step %d, from %s; all values are finite", reading.record.step, checkpoint.folder)
        for name, now in (("config", recipe.as_tree()), ("environment", environment())):
            for change in changes(checkpoint.state[name], now):
                log.info("changed since that checkpoint: %s", change)
    elif initial is not None:
        moments = "" if initial.optimizer_steps is None else " and moments"
        log.info("starts with the weights%s of %s; all are finite", moments, initial.checkpoint.folder)
        for difference in initial.differences:
            log.info("different from those weights: %s", difference)


def log_course(
    recipe: TrainingRecipe, folder: RunFolder, identity: Mapping[str, Any], checkpoint: Metadata | None
) -> None:
    """Log the ancestry of a run that resumes, a rollback before this start, and a learning rate that rises again."""
    if checkpoint is None:
        return
    if ancestors := ancestors_in(identity):
        log.info("%s", describe_ancestry(ancestors))
        for change in ancestors[-1].changes:
            log.info("different from %s: %s", ancestors[-1].name, change)
    if rollback := rollback_before(identity, starts_noted_at(folder.generation)):
        log.info("%s", rollback)
    if warning := describe_extended_decay(checkpoint, recipe, str(folder.path)):
        log.warning("%s", warning)
