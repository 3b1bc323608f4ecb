"""The start of a run: from a recipe to a run that is ready for its next step.

A start of a run whose folder holds a valid checkpoint resumes from it. The bytes that it then reads, the dropout that
it draws and so its losses are those of the uninterrupted run.
"""

import logging
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from byteloom.core.files import replace_file
from byteloom.core.provenance import changes, environment, flatten, read_source, source_file, source_text
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.stream.byte_stream import ByteStream
from data_pipeline.stream.loader import Loader
from data_pipeline.stream.mixture import fingerprint_of
from data_pipeline.stream.reading import Reading, open_streams
from data_pipeline.stream.record import Record
from launchers.supervision.heartbeat import Heartbeat
from launchers.supervision.record import reason_of_start
from pretrain.checkpoint import CheckpointStore, Metadata, locate
from pretrain.checkpoint.fence import Fence, starts_noted_at
from pretrain.distributed.fragments import Fragment
from pretrain.distributed.world import World
from pretrain.engines import Engine, build_engine, check_ranks, choose_device, choose_precision, has_native_bf16
from pretrain.engines.peak import peak_flops
from pretrain.models import ByteModel, build_model, carries_memory, describe_attention
from pretrain.terminal.console import display
from pretrain.tracking import Journal, RunDescription, open_recorder
from pretrain.training.checks import check_lanes, check_resumes, check_same_recipe, check_same_run
from pretrain.training.config import TrainingRecipe
from pretrain.training.meter import Meter
from pretrain.training.run import TrainingRun
from pretrain.training.run_folder import RunFolder
from pretrain.training.stop import StopRequest
from pretrain.training.weights import InitialWeights, find_initial_weights

log = logging.getLogger(__name__)


@contextmanager
def start(recipe: TrainingRecipe, world: World, source: Mapping[str, str], stop: StopRequest) -> Iterator[TrainingRun]:
    """Yield the run of a recipe, ready for its next step; hold its folder and write its log within.

    Args:
        recipe: of the run.
        world: the ranks of the run; all of them start it.
        source: tags that say where the recipe and the code come from.
        stop: a request that may come at any time.

    Raises:
        TrainingError, CorpusError, EngineError, CheckpointError, RunFolderError, WorldError: the run cannot start.
    """
    # Whatever can be refused without a run folder is refused before one is made.
    check_same_recipe(recipe, world)
    streams, validation = _open_corpora(recipe)
    choose_device(recipe.engine.device, world.local_rank)
    check_ranks(recipe.engine, world.size)
    folder = RunFolder(Path(recipe.run.root) / recipe.run.name)
    initial = _find_initial_weights(recipe, folder, world)
    heartbeat = _heartbeat(world, stop)
    with ExitStack() as held:
        world.on_first(lambda: held.enter_context(folder.locked(take_over=heartbeat.is_watched)))
        fence = _fence(recipe, folder)
        held.enter_context(_log_to(folder.log_of(world.rank), fence))
        for warning in recipe.warnings() if world.is_first else ():
            log.warning("%s", warning.text)
        fingerprint = fingerprint_of(streams)
        identity = _identity(recipe, folder, fingerprint, world)
        precision = _precision(recipe, folder, identity, world)
        fence.mark = world.on_first(fence.claim)
        store = _store(recipe, folder, world, fence)
        with torch.device("meta"):
            model = build_model(recipe.model)
        parameters = model.parameter_count()  # while the model is whole
        _log_first_line(recipe, folder, world, parameters, precision)
        flops_a_step = 3 * model.flops(recipe.model.sequence_length) * recipe.train.global_batch
        engine = _engine(recipe, model, precision, world)
        checkpoint = _load(store, engine, recipe, fingerprint)
        if checkpoint is None:
            _begin(engine, initial)
        reading = Reading(recipe.data, streams, _record(checkpoint, world), recipe.train.global_batch)
        if world.is_first:
            folder.keep_precision(identity, precision)
            _write_recipe(recipe, folder, source)
        peak = _rehearse(recipe, engine, precision, world)
        _log_facts(recipe, engine, reading, checkpoint, initial)
        meter = Meter(flops_a_step, None if peak is None else peak * world.size)
        loader = _loader(recipe, reading, world, stop)
        journal = _journal(folder, checkpoint) if world.is_first else None
        unlogged = _unlogged(checkpoint, journal, world)
        recorder = None
        if journal is not None:
            facts = {"parameters": parameters, "precision": precision}
            description = _description(recipe, folder, identity, facts, reading, checkpoint)
            recorder = open_recorder(recipe.tracking, journal, description, lambda: fence.holds)
            stop.before_exit.append(lambda code: recorder.close("KILLED", is_hurried=lambda: True))
        yield TrainingRun(
            recipe=recipe,
            world=world,
            folder=folder,
            stop=stop,
            fence=fence,
            heartbeat=heartbeat,
            identity=identity["id"],
            fingerprint=fingerprint,
            precision=precision,
            model=model,
            engine=engine,
            store=store,
            reading=reading,
            loader=loader,
            validation=validation,
            checkpoint=checkpoint,
            meter=meter,
            recorder=recorder,
            unlogged=unlogged,
        )


def _open_corpora(recipe: TrainingRecipe) -> tuple[dict[str, ByteStream], Corpus | None]:
    """Return the streams of a recipe by source, and the corpus of its validation."""
    streams = open_streams(recipe.data, recipe.model.sequence_length)
    if carries_memory(recipe.model):
        check_lanes(streams, recipe.train.global_batch)
    shards = recipe.validation.shards
    return streams, Corpus(shards, remote=recipe.data.remote) if shards else None


def _find_initial_weights(recipe: TrainingRecipe, folder: RunFolder, world: World) -> InitialWeights | None:
    """Return the weights that a new run begins with; None for first values, and for a run that has a checkpoint."""

    def has_checkpoint() -> bool:  # which need not be valid
        return bool(CheckpointStore(folder.checkpoints_in(recipe.checkpoint.home), keep=None).committed())

    if recipe.initialize.weights is None or world.on_first(has_checkpoint):
        return None
    with torch.device("meta"):
        model = build_model(recipe.model)
    with display.phase(f"verifying {recipe.initialize.weights}") as phase:
        return find_initial_weights(recipe.initialize, recipe.model, model, recipe.optimizer.name, world, phase.update)


def _heartbeat(world: World, stop: StopRequest) -> Heartbeat:
    heartbeat = Heartbeat.of(os.environ, world.rank)
    if heartbeat.is_watched:
        stop.before_exit.append(heartbeat.end)
    return heartbeat


def _fence(recipe: TrainingRecipe, folder: RunFolder) -> Fence:
    home = locate(folder.checkpoints_in(recipe.checkpoint.home))
    return Fence(folder.generation, *([home / "generation"] if recipe.checkpoint.home else []))


def _identity(recipe: TrainingRecipe, folder: RunFolder, fingerprint: str, world: World) -> dict[str, Any]:
    """Return what the run began as.

    Raises:
        CheckpointError: the recipe describes another run.
    """
    tree = recipe.as_tree()
    made_of = {"model": tree["model"], "data": tree["data"], "fingerprint": fingerprint}
    identity: dict[str, Any] = world.on_first(lambda: folder.identity(made_of))
    check_same_run(folder.path, identity, recipe, fingerprint)
    return identity


def _precision(recipe: TrainingRecipe, folder: RunFolder, identity: dict[str, Any], world: World) -> str:
    """Return the precision of the passes, chosen by the first rank for all."""
    device = choose_device(recipe.engine.device, world.local_rank)
    precision: str = world.on_first(
        lambda: choose_precision(recipe.engine.precision, device, folder.earlier_precision(identity))
    )
    return precision


def _store(recipe: TrainingRecipe, folder: RunFolder, world: World, fence: Fence) -> CheckpointStore:
    """Return the checkpoints of the run, without what a killed process left there."""
    store = CheckpointStore(
        folder.checkpoints_in(recipe.checkpoint.home),
        recipe.checkpoint.keep,
        world,
        keep_every=recipe.checkpoint.keep_every,
        fence=fence.check_everywhere,
    )
    world.on_first(store.sweep)
    return store


def _engine(recipe: TrainingRecipe, model: ByteModel, precision: str, world: World) -> Engine:
    return build_engine(
        recipe.engine.model_copy(update={"precision": precision}),
        model,
        recipe.optimizer,
        recipe.train.seed,
        world,
        global_batch=recipe.train.global_batch,
        micro_batch=recipe.train.micro_batch,
    )


def _load(store: CheckpointStore, engine: Engine, recipe: TrainingRecipe, fingerprint: str) -> Metadata | None:
    """Fill the engine from the newest valid checkpoint and return its metadata; None where there is no checkpoint."""

    def everything(checkpoint: Metadata) -> list[Fragment]:
        check_resumes(checkpoint, recipe, fingerprint)
        return engine.fragments()

    with display.phase("loading the checkpoint") as phase:
        checkpoint = store.load(everything, set_aside=True, progress=phase.update)
    if checkpoint is not None:
        engine.restore(checkpoint.state["counters"])
    return checkpoint


def _begin(engine: Engine, initial: InitialWeights | None) -> None:
    """Give the engine first values, and the initial weights that the recipe names."""
    with display.phase("making the first weights"):
        engine.begin()
        if initial is not None:
            initial.fill(engine)


def _record(checkpoint: Metadata | None, world: World) -> Record:
    """Return the record of what the run has read."""
    if checkpoint is None:
        return Record()
    record = Record.from_state(checkpoint.state["reading"])
    if not world.is_first:
        record.digest = Record().digest  # covers what this rank reads from here on
    return record


def _loader(recipe: TrainingRecipe, reading: Reading, world: World, stop: StopRequest) -> Loader:
    """Return the loader of this rank's micro-batches, from the first sequence that the run has not read."""
    return Loader(
        reading.mixture,
        recipe.loader,
        global_batch=recipe.train.global_batch,
        micro_batch=recipe.train.micro_batch,
        first_sequence=reading.record.next_sequence,
        rank=world.rank,
        world_size=world.size,
        digest=True,
        give_up=lambda: stop.signal is not None,
    )


def _write_recipe(recipe: TrainingRecipe, folder: RunFolder, source: Mapping[str, str]) -> None:
    """Write the resolved recipe of this start, and the file of its source."""
    resolved = recipe.as_yaml()
    replace_file(folder.config, resolved)
    replace_file(source_file(folder.config), source_text(resolved, source))


def _rehearse(recipe: TrainingRecipe, engine: Engine, precision: str, world: World) -> float | None:
    """Pass one made-up micro-batch before data is touched; return the peak FLOP/s of a device, None if unknown."""

    def measure() -> tuple[float, str] | None:
        is_native = precision == "fp32" or has_native_bf16(engine.device)  # else the device emulates products
        return peak_flops(engine.device, engine.dtype) if is_native else None

    started = time.perf_counter()
    compiling = ", compiling the blocks" if recipe.engine.compile else ""
    with display.phase(f"rehearsing a micro-batch{compiling}"):
        engine.rehearse(min(recipe.train.micro_batch, recipe.train.global_batch))
    rehearsal = time.perf_counter() - started
    peak: tuple[float, str] | None = world.on_first(measure)
    log.info(
        "micro-batch rehearsed in %.1f s; %s",
        rehearsal,
        "peak unknown, so no MFU" if peak is None else f"peak {peak[0] / 1e12:.3g} TFLOP/s ({peak[1]})",
    )
    return None if peak is None else peak[0]


def _journal(folder: RunFolder, checkpoint: Metadata | None) -> Journal:
    return Journal(folder.metrics, None if checkpoint is None else checkpoint.state["reading"]["step"])


def _unlogged(checkpoint: Metadata | None, journal: Journal | None, world: World) -> dict[str, float]:
    """Return the numbers that came with the checkpoint, unless an earlier start has logged them."""
    if checkpoint is None or not checkpoint.state.get("unlogged"):
        return {}
    step = checkpoint.state["reading"]["step"]
    is_logged = world.on_first(lambda: journal is None or journal.last_step == step)
    return {} if is_logged else checkpoint.state["unlogged"]


def _description(
    recipe: TrainingRecipe,
    folder: RunFolder,
    identity: Mapping[str, Any],
    facts: Mapping[str, Any],
    reading: Reading,
    checkpoint: Metadata | None,
) -> RunDescription:
    """Return what trackers receive about this start; `facts` are parameters that follow from the recipe."""
    corpora = [stream.corpus.content_sha256 for stream in reading.mixture.streams.values()]
    return RunDescription(
        name=recipe.run.name,
        identity=identity["id"],
        params={**flatten(recipe.as_tree()), **facts},
        tags={
            "corpus.fingerprint": identity["fingerprint"],
            "corpus.content_sha256": " ".join(corpora),
            "host": platform.node(),
            **environment(),
            **read_source(folder.config),
        },
        begins_after=-1 if checkpoint is None else reading.record.step,
        start=starts_noted_at(folder.generation),
        reason=reason_of_start(folder.path, os.environ),
        folder=folder.path,
    )


def _log_first_line(recipe: TrainingRecipe, folder: RunFolder, world: World, parameters: int, precision: str) -> None:
    log.info(
        "training %s: %s, %s parameters, %s on %s, %s",
        folder.path,
        recipe.model.family,
        f"{parameters:,}",
        precision,
        choose_device(recipe.engine.device, world.local_rank),
        f"{recipe.engine.name} of {world.size} ranks" if world.size > 1 else "one process",
    )


def _log_facts(
    recipe: TrainingRecipe,
    engine: Engine,
    reading: Reading,
    checkpoint: Metadata | None,
    initial: InitialWeights | None,
) -> None:
    """Log what the run computes with, what it reads, and where it begins."""
    log.info("attention: %s", describe_attention(engine.device, engine.dtype))
    for name, stream in reading.mixture.streams.items():
        log.info(
            "%s: %s bytes, %s sequences of %s bytes per epoch; the run reads %.2f epochs",
            f"{name}, {stream.corpus.location}" if recipe.data.mixture else stream.corpus.location,
            f"{stream.corpus.raw_bytes:,}",
            f"{stream.sequences_per_epoch:,}",
            f"{stream.sequence_length:,}",
            reading.mixture.epochs(reading.sequences_in_all(recipe.train.steps))[name],
        )
    if checkpoint is not None:
        log.info("resumes after step %d, from %s", reading.record.step, checkpoint.folder)
        for name, now in (("config", recipe.as_tree()), ("environment", environment())):
            for change in changes(checkpoint.state[name], now):
                log.info("changed since that checkpoint: %s", change)
    elif initial is not None:
        moments = "" if initial.optimizer_steps is None else " and moments"
        log.info("starts with the weights%s of %s", moments, initial.checkpoint.folder)
        for difference in initial.differences:
            log.info("different from those weights: %s", difference)


@contextmanager
def _log_to(path: Path, fence: Fence) -> Iterator[None]:
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
