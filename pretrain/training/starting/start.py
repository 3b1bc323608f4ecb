"""The start of a run: from a recipe to a run that is ready for its next step.

A start of a run whose folder holds a valid checkpoint resumes from it. The bytes that it then reads, the dropout that
it draws and so its losses are those of the uninterrupted run.
"""

import logging
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from byteloom.core.provenance import environment, flatten, read_source, source_file, source_text
from byteloom.core.storage.files import replace_file
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.stream.byte_stream import ByteStream
from data_pipeline.stream.inspection.coverage import Coverage, coverage_of
from data_pipeline.stream.loader import Loader
from data_pipeline.stream.mixture import as_begun, fingerprint_of
from data_pipeline.stream.reading import Reading, open_streams
from launchers.supervision.heartbeat import Heartbeat
from launchers.supervision.record import reason_of_start
from pretrain.checkpoint import CheckpointError, CheckpointStore, Metadata
from pretrain.checkpoint.homes.fence import Fence, starts_noted_at
from pretrain.distributed.context import group_of
from pretrain.distributed.fragments import Fragment
from pretrain.distributed.world import World
from pretrain.engines import (
    Engine,
    build_engine,
    check_ranks,
    choose_device,
    choose_precision,
    has_native_bf16,
    remark_on_idle_ranks,
)
from pretrain.engines.peak import peak_flops
from pretrain.estimate.training_flops import training_flops
from pretrain.models import ByteModel, carries_memory, form_of, image_of
from pretrain.models.entropy_model import stored_entropies_of
from pretrain.models.finetune import build_finetuned
from pretrain.models.initial import WHOLE_DRAWING
from pretrain.objectives import show_entropies, show_rows
from pretrain.optim.scaling import scale_model
from pretrain.terminal.console import display
from pretrain.tracking import Journal, RunDescription, open_recorder
from pretrain.training.agreement import agree_on_corpora, call_together
from pretrain.training.ancestry import ANCESTRY, ancestors_in, ancestry_tags
from pretrain.training.config import TrainingRecipe
from pretrain.training.health import HealthEvent, HealthLog
from pretrain.training.health.rewind import monitor_of, record_of, rewinds_of, steps_left, take_up_rewinds
from pretrain.training.home_owner import HomeOwner, fence_of, find_owner, take_home
from pretrain.training.lineage import LINEAGE, stored_lineage
from pretrain.training.meter import Meter
from pretrain.training.run import TrainingRun
from pretrain.training.run_folder import STARTED_IN, RunFolder, rollback_before
from pretrain.training.starting.checks import (
    BegunStream,
    check_belongs,
    check_images,
    check_lanes,
    check_resumes,
    check_same_recipe,
    check_same_run,
    stream_of_identity,
    stream_of_state,
)
from pretrain.training.starting.log import log_course, log_facts, log_first_line, log_to
from pretrain.training.stop import StopRequest
from pretrain.training.weights import InitialWeights, find_initial_weights
from pretrain.training.weights.frozen_models import check_frozen_model, copy_frozen_model, with_run_copy

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
    recipe, folder = call_together(world, partial(_in_folder, recipe))
    check_same_recipe(recipe, world)
    streams, validation = _open_corpora(recipe, world)
    choose_device(recipe.engine.device, world.local_rank)
    check_ranks(recipe.engine, world.size)
    initial = _find_initial_weights(recipe, folder, world)
    streams = _in_order_of_run(recipe, folder, streams, world)
    with display.phase("looking for checkpoints"):
        owner = HomeOwner(*world.on_first(lambda: find_owner(recipe, folder, streams)))
    heartbeat = _heartbeat(world, stop)
    with ExitStack() as held:
        world.on_first(lambda: held.enter_context(folder.locked(take_over=heartbeat.is_supervised)))
        fence = fence_of(folder, recipe.checkpoint.home)
        call_together(world, lambda: held.enter_context(log_to(folder.log_of(world.rank), fence)))
        _warn(recipe, world)
        identity = _identity(recipe, folder, streams, owner, world)
        precision = _precision(recipe, folder, identity, world)
        world.on_first(lambda: take_home(recipe, folder, streams, identity["id"]))
        fence.mark = world.on_first(lambda: fence.claim(after=owner.generation))
        store = _store(recipe, folder, world, fence, identity["id"])
        rewinds = take_up_rewinds(folder, store, world)
        with torch.device("meta"):
            model = scale_model(build_finetuned(recipe.model, recipe.finetune), recipe.model, recipe.optimizer)
        parameters = model.parameter_count()  # while the model is whole
        log_first_line(recipe, folder, world, model, precision)
        flops_a_step = training_flops(model, recipe.model, recipe.finetune) * recipe.train.global_batch
        engine = _engine(recipe, model, precision, world)
        checkpoint = _load(store, engine, recipe, streams, rewinds)
        if checkpoint is None:
            _begin(engine, initial, identity.get("first_values", WHOLE_DRAWING), world)
        identity = _completed(identity, precision, checkpoint, folder)
        reading = Reading(recipe.data, streams, record_of(checkpoint, rewinds, world), recipe.train.global_batch)
        world.on_first(partial(_write_start, recipe, folder, source, identity))
        peak = _rehearse(recipe, engine, precision, world)
        coverage = _coverage(folder, streams, world)
        log_facts(recipe, engine, reading, coverage, checkpoint, initial)
        log_course(recipe, folder, identity, checkpoint if world.is_first else None)
        meter = Meter(flops_a_step, None if peak is None else peak * world.size, recipe.objective.metric)
        loader = _loader(recipe, reading, world, stop)
        journal = call_together(world, lambda: _journal(folder, checkpoint) if world.is_first else None)
        unlogged = _unlogged(checkpoint, journal, world)
        recorder = None
        if journal is not None:
            facts = {"parameters": parameters, "precision": precision}
            description = _description(recipe, folder, identity, facts, reading, coverage, checkpoint, rewinds=rewinds)
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
            first_values=identity.get("first_values", WHOLE_DRAWING),
            ancestry=identity.get(ANCESTRY, []),
            lineage=_lineage(checkpoint, initial),
            fingerprint=fingerprint_of(streams),
            precision=precision,
            model=model,
            engine=engine,
            store=store,
            reading=reading,
            loader=loader,
            validation=validation,
            checkpoint=checkpoint,
            health=monitor_of(recipe.health, checkpoint, rewinds),
            meter=meter,
            recorder=recorder,
            unlogged=unlogged,
        )


def _warn(recipe: TrainingRecipe, world: World) -> None:
    """Log what is valid but most often a mistake, on the first rank."""
    train = recipe.train
    idle = remark_on_idle_ranks(recipe.engine, train.global_batch, train.micro_batch, world.size)
    for text in (*(warning.text for warning in recipe.warnings()), *filter(None, [idle])) if world.is_first else ():
        log.warning("%s", text)


def _open_corpora(recipe: TrainingRecipe, world: World) -> tuple[dict[str, ByteStream], dict[str, Corpus]]:
    """Return the streams of a recipe by source, and its validation corpora by name: the same ones on all ranks."""

    def opened() -> tuple[dict[str, ByteStream], dict[str, Corpus]]:
        streams = open_streams(recipe.data, recipe.model.sequence_length, stored_entropies_of(recipe.model))
        return streams, {
            name: Corpus(named.shards, remote=recipe.data.remote, digest=named.shards_sha256)
            for name, named in recipe.validation.by_name().items()
        }

    streams, validation = call_together(world, opened)
    agree_on_corpora([*(stream.corpus for stream in streams.values()), *validation.values()], world)
    if carries_memory(recipe.model):
        check_lanes(streams, recipe.train.global_batch)
    if (image := image_of(recipe.model)) is not None:
        check_images(streams, image)
    return streams, validation


def _in_folder(recipe: TrainingRecipe) -> tuple[TrainingRecipe, RunFolder]:
    """Return a recipe that names the copies of the run's folder where originals are gone, and the folder.

    Raises:
        FrozenModelError: the recipe has a frozen model, and there is neither its export nor a copy.
    """
    folder = RunFolder(Path(recipe.run.root) / recipe.run.name)
    recipe = recipe.model_copy(update={"model": with_run_copy(recipe.model, folder.path)})
    check_frozen_model(recipe.model)
    return recipe, folder


def _find_initial_weights(recipe: TrainingRecipe, folder: RunFolder, world: World) -> InitialWeights | None:
    """Return the weights that a new run begins with; None for first values, and for a run that has a checkpoint."""

    def has_checkpoint() -> bool:  # which need not be valid
        store = CheckpointStore(folder.checkpoints_in(recipe.checkpoint.home), keep=None)
        return len(store.committed()) > len(steps_left(store, rewinds_of(HealthLog(folder.health))))

    if recipe.initialize.weights is None or world.on_first(has_checkpoint):
        return None
    with torch.device("meta"):
        model = build_finetuned(recipe.model, recipe.finetune)
    with display.phase(f"verifying {recipe.initialize.weights}") as phase:
        return find_initial_weights(recipe.initialize, recipe.model, model, recipe.optimizer.name, world, phase.update)


def _heartbeat(world: World, stop: StopRequest) -> Heartbeat:
    heartbeat = Heartbeat.of(os.environ, world.rank, world.size)
    if heartbeat.is_watched:
        stop.before_exit.append(heartbeat.end)
    return heartbeat


def _in_order_of_run(
    recipe: TrainingRecipe, folder: RunFolder, streams: Mapping[str, ByteStream], world: World
) -> dict[str, ByteStream]:
    """Return streams in the version of the order with which the run began, which the first rank finds for all."""

    def begun() -> BegunStream | None:
        if (identity := folder.stored_identity()) is not None:
            return stream_of_identity(identity)
        newest = next(CheckpointStore(folder.checkpoints_in(recipe.checkpoint.home), keep=None).states(), None)
        return None if newest is None else stream_of_state(newest)

    found = world.on_first(begun)
    return dict(streams) if found is None else as_begun(streams, *found)


def _identity(
    recipe: TrainingRecipe, folder: RunFolder, streams: Mapping[str, ByteStream], owner: HomeOwner, world: World
) -> dict[str, Any]:
    """Return what the run began as.

    Raises:
        CheckpointError: the recipe describes another run.
    """
    tree = recipe.as_tree()
    made_of = {"model": tree["model"], "data": tree["data"], "fingerprint": fingerprint_of(streams)}
    identity: dict[str, Any] = world.on_first(lambda: folder.identity(made_of, owner.run, owner.first_values))
    check_same_run(folder.path, identity, recipe, streams)
    return identity


def _precision(recipe: TrainingRecipe, folder: RunFolder, identity: dict[str, Any], world: World) -> str:
    """Return the precision of the passes, chosen by the first rank for all."""
    device = choose_device(recipe.engine.device, world.local_rank)
    precision: str = world.on_first(
        lambda: choose_precision(recipe.engine.precision, device, folder.earlier_precision(identity))
    )
    return precision


def _store(recipe: TrainingRecipe, folder: RunFolder, world: World, fence: Fence, run: str) -> CheckpointStore:
    """Return the checkpoints of the run, without what a killed process left there."""
    store = CheckpointStore(
        folder.checkpoints_in(recipe.checkpoint.home),
        recipe.checkpoint.keep,
        world,
        keep_every=recipe.checkpoint.keep_every,
        fence=fence.check_everywhere,
        run=run,
    )
    world.on_first(store.sweep)
    return store


def _engine(recipe: TrainingRecipe, model: ByteModel, precision: str, world: World) -> Engine:
    """Return the engine, once all ranks have read what the model needs besides its parameters."""
    engine = build_engine(
        recipe.engine.model_copy(update={"precision": precision}),
        model,
        recipe.optimizer,
        recipe.train.seed,
        world,
        global_batch=recipe.train.global_batch,
        micro_batch=recipe.train.micro_batch,
    )

    def prepare() -> None:
        for patcher in model.patchers().values():
            patcher.prepare(engine.device)

    call_together(world, prepare)
    return engine


def _load(
    store: CheckpointStore,
    engine: Engine,
    recipe: TrainingRecipe,
    streams: Mapping[str, ByteStream],
    rewinds: Sequence[HealthEvent],
) -> Metadata | None:
    """Fill the engine from the newest valid checkpoint and return its metadata; None where there is no checkpoint."""
    if not store.committed() and any(event.to_step == 0 for event in rewinds):
        return None  # the store would miss the checkpoints that were quarantined

    def everything(checkpoint: Metadata) -> list[Fragment]:
        check_belongs(checkpoint, recipe)
        check_resumes(checkpoint, recipe, streams)
        return engine.fragments()

    with display.phase("loading the checkpoint") as phase:
        checkpoint = store.load(everything, set_aside=True, progress=phase.update)
    if checkpoint is not None:
        engine.restore(checkpoint.state["counters"])
    return checkpoint


def _begin(engine: Engine, initial: InitialWeights | None, version: int, world: World) -> None:
    """Give the engine first values of a version, and the initial weights that the recipe names."""
    with display.phase("making the first weights"):
        engine.begin(version)
        if initial is not None:
            initial.fill(engine, world)


def _loader(recipe: TrainingRecipe, reading: Reading, world: World, stop: StopRequest) -> Loader:
    """Return the loader of this rank's micro-batches, from the first sequence that the run has not read."""
    group, groups = group_of(world.rank, world.size, recipe.engine.context)
    loader = Loader(
        reading.mixture,
        recipe.loader,
        global_batch=recipe.train.global_batch,
        micro_batch=recipe.train.micro_batch,
        first_sequence=reading.record.next_sequence,
        rank=group,
        world_size=groups,
        digest=world.rank % recipe.engine.context == 0,  # once for each micro-batch
        give_up=lambda: stop.signal is not None,
    )
    show = show_rows(recipe.objective, form_of(recipe.model, recipe.objective), recipe.train.seed)
    loader = loader.showing(show if stored_entropies_of(recipe.model) is None else show_entropies)
    return loader.without(reading.skips).until(reading.sequences_in_all(recipe.train.steps))


def _completed(
    identity: Mapping[str, Any], precision: str, checkpoint: Metadata | None, folder: RunFolder
) -> dict[str, Any]:
    """Return the identity of a run with facts of this start, and with the ancestry that its checkpoint holds.

    Raises:
        CheckpointError: a branch has no checkpoint, so it would begin with first values.
    """
    ancestry = identity.get(ANCESTRY) or (checkpoint.state.get(ANCESTRY) if checkpoint is not None else None)
    if ancestry and checkpoint is None:
        parent = ancestors_in(identity)[-1]
        raise CheckpointError(
            f"{folder.path} is a branch of {parent.name} at step {parent.step}, and has no checkpoint; restore one "
            f"from a copy, or make another branch of {parent.checkpoint}"
        )
    own = {"precision": precision, STARTED_IN: str(Path.cwd())}
    return {**identity, **own, **({ANCESTRY: ancestry} if ancestry else {})}


def _lineage(checkpoint: Metadata | None, initial: InitialWeights | None) -> list[dict[str, Any]]:
    """Return what the weights of a run descend from, as JSON values, oldest first."""
    if checkpoint is not None:
        found: list[dict[str, Any]] = checkpoint.state.get(LINEAGE, [])
        return found
    return [] if initial is None else stored_lineage(initial.checkpoint)


def _write_start(
    recipe: TrainingRecipe, folder: RunFolder, source: Mapping[str, str], identity: Mapping[str, Any]
) -> None:
    """Write run.json, the resolved recipe of this start, and the file of its source."""
    if folder.stored_identity() != identity:
        folder.write_identity(identity)
    resolved = recipe.as_yaml()
    copy_frozen_model(recipe.model, folder.path)
    replace_file(folder.config, resolved)
    replace_file(source_file(folder.config), source_text(resolved, source))


def _coverage(folder: RunFolder, streams: Mapping[str, ByteStream], world: World) -> dict[str, Coverage]:
    """Return what an epoch reads of each source, which the first rank finds and writes for `status`."""

    def find() -> dict[str, dict[str, Any]]:
        coverage = {name: coverage_of(stream) for name, stream in streams.items()}
        folder.write_coverage(coverage)
        return {name: each.model_dump() for name, each in coverage.items()}

    return {name: Coverage(**fields) for name, fields in world.on_first(find).items()}


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
    coverage: Mapping[str, Coverage],
    checkpoint: Metadata | None,
    *,
    rewinds: Sequence[HealthEvent],
) -> RunDescription:
    """Return what trackers receive about this start; `facts` are parameters that follow from the recipe."""
    state = {} if checkpoint is None else checkpoint.state
    reason = next((event.text for event in reversed(rewinds) if not event.is_known_to(state)), None)
    corpora = [stream.corpus.content_sha256 for stream in reading.mixture.streams.values()]
    number = starts_noted_at(folder.generation)
    return RunDescription(
        name=recipe.run.name,
        identity=identity["id"],
        params={**flatten(recipe.as_tree()), **facts},
        tags={
            "corpus.fingerprint": identity["fingerprint"],
            "corpus.content_sha256": " ".join(corpora),
            **{f"coverage.{name}": str(each) for name, each in coverage.items()},
            "host": platform.node(),
            **ancestry_tags(ancestors_in(identity)),
            **environment(),
            **read_source(folder.config),
        },
        begins_after=-1 if checkpoint is None else reading.record.step,
        start=number,
        reason=reason or str(rollback_before(identity, number) or reason_of_start(folder.path, os.environ)),
        folder=folder.path,
    )
