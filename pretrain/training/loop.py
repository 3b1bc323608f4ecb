"""The training loop.

    Reading ─▶ Loader ─▶ Engine.train_step ─▶ numbers ─▶ Tracker
       │                        │
       └───────────────▶ CheckpointStore: tensors, and the record of what was read

Every rank runs this loop. They say to each other before each step whether they have data and may go on, so that all
leave it together; the first one alone writes numbers, and talks.

A start of a run whose folder holds a valid checkpoint goes on from it; the bytes it then reads, the dropout it draws
and so its losses are those of the uninterrupted run.
"""

import contextlib
import logging
import os
import platform
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from byteloom.core.files import replace_file
from byteloom.core.provenance import changes, environment, flatten, read_source, source_file, source_text
from byteloom.core.text import count
from byteloom.core.validation import Fault
from data_pipeline.corpus.shards import Corpus
from data_pipeline.stream.byte_stream import ByteStream
from data_pipeline.stream.loader import Batch, Loader, LoaderConfig
from data_pipeline.stream.mixture import fingerprint_of
from data_pipeline.stream.reading import DataConfig, Reading, Record, merged, open_streams
from data_pipeline.stream.rows import Ids
from launchers.supervision.heartbeat import Heartbeat
from launchers.supervision.record import reason_of_start
from pretrain.checkpoint import CheckpointConfig, CheckpointError, CheckpointStore, Metadata, locate
from pretrain.checkpoint.fence import Fence, starts_noted_at
from pretrain.distributed.fragments import Fragment
from pretrain.distributed.world import ALONE, World
from pretrain.engines import (
    EngineConfig,
    NonFiniteError,
    StepResult,
    build_engine,
    check_ranks,
    choose_device,
    choose_precision,
    has_native_bf16,
)
from pretrain.engines.peak import peak_flops
from pretrain.evaluation.config import ValidationConfig
from pretrain.evaluation.evaluate import evaluate
from pretrain.evaluation.modes import stride_of
from pretrain.evaluation.scores import Score
from pretrain.models import (
    ModelConfig,
    build_model,
    carries_memory,
    describe_attention,
)
from pretrain.optim import OptimizerConfig, learning_rate_at
from pretrain.terminal.console import display
from pretrain.terminal.progress import TrainingProgress, duration, size
from pretrain.tracking import Journal, RunDescription, Tracker, TrackingConfig, open_tracker
from pretrain.training.meter import Meter
from pretrain.training.profiling import ProfileConfig, StepProfiler
from pretrain.training.run_folder import RunConfig, RunFolder
from pretrain.training.stop import StoppedError, StopRequest, Vote
from pretrain.training.weights import InitializeConfig, Origin, find_origin, model_changes

log = logging.getLogger(__name__)


class TrainConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """How long, and how much at a time."""

    steps: int = Field(ge=1)
    """Optimizer steps of the whole run."""
    global_batch: int = Field(ge=1)
    """Sequences of one optimizer step."""
    micro_batch: int = Field(ge=1)
    """Sequences of one forward and backward pass; gradients add up over the micro-batches of a global batch. Lower it
    when memory is short: the order of bytes does not depend on it."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the initial weights and of dropout."""


class Recipe(Protocol):
    """What the loop needs of the config tree."""

    @property
    def run(self) -> RunConfig: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def loader(self) -> LoaderConfig: ...
    @property
    def model(self) -> ModelConfig: ...
    @property
    def initialize(self) -> InitializeConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def engine(self) -> EngineConfig: ...
    @property
    def validation(self) -> ValidationConfig: ...
    @property
    def checkpoint(self) -> CheckpointConfig: ...
    @property
    def tracking(self) -> TrackingConfig: ...
    @property
    def profile(self) -> ProfileConfig: ...
    def as_tree(self) -> dict[str, Any]:
        """The whole tree as JSON values."""

    def as_yaml(self) -> str:
        """The whole tree as a recipe."""

    def warnings(self) -> list[Fault]:
        """Return what is allowed and yet is most often a slip."""


class TrainingError(Exception):
    """A run cannot go on."""


def train(
    recipe: Recipe,
    world: World = ALONE,
    source: Mapping[str, str] | None = None,
    stop: StopRequest | None = None,
) -> int:
    """Train the run that a recipe describes, from its newest checkpoint on; return the process's exit code.

    Args:
        source: tags that say where the recipe and the code come from; see provenance.py.
        stop: a request that may come at any time; none can come if left out.
    Raises:
        TrainingError, CorpusError, EngineError, CheckpointError, RunFolderError, WorldError: it cannot start or go on;
            says why.
    """
    stop = stop or StopRequest()
    _check_same_recipe(recipe, world)
    # Everything that can be refused without a run folder is, before one is made.
    streams = open_streams(recipe.data, recipe.model.sequence_length)
    if carries_memory(recipe.model):
        check_lanes(streams, recipe.train.global_batch)
    validation = Corpus(recipe.validation.shards, remote=recipe.data.remote) if recipe.validation.shards else None
    choose_device(recipe.engine.device, world.local_rank)
    check_ranks(recipe.engine, world.size)
    folder = RunFolder(Path(recipe.run.root) / recipe.run.name)
    origin = _find_origin(recipe, folder, world)
    with ExitStack() as stack:
        heartbeat = Heartbeat.of(os.environ, world.rank)
        if heartbeat.is_watched:
            stop.before_exit.append(heartbeat.end)
        world.on_first(lambda: stack.enter_context(folder.locked(take_over=heartbeat.is_watched)))
        home = locate(folder.checkpoints_in(recipe.checkpoint.home))
        fence = Fence(folder.generation, *([home / "generation"] if recipe.checkpoint.home else []))
        stack.enter_context(_log_to(folder.log_of(world.rank), fence))
        for warning in recipe.warnings() if world.is_first else ():
            log.warning("%s", warning.text)
        run = Run(recipe, folder, streams, validation, origin, stop, world=world, fence=fence, heartbeat=heartbeat)
        if world.is_first:
            resolved = folder.config.read_text(encoding="utf-8")
            replace_file(source_file(folder.config), source_text(resolved, source or {}))
        return run.go()


class Run:
    """One start of a run: model and engine, with the newest checkpoint in them."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        streams: dict[str, ByteStream],
        validation: Corpus | None,
        origin: Origin | None,
        stop: StopRequest,
        *,
        world: World,
        fence: Fence,
        heartbeat: Heartbeat,
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.fingerprint = fingerprint_of(streams)
        self.validation = validation
        self.origin = origin
        self.stop = stop
        self.world = world
        self.fence = fence
        self.heartbeat = heartbeat
        tree = recipe.as_tree()
        made_of = {"model": tree["model"], "data": tree["data"], "fingerprint": self.fingerprint}
        self.identity: dict[str, Any] = world.on_first(lambda: folder.identity(made_of))
        check_same_run(folder.path, self.identity, recipe, self.fingerprint)
        self.precision = self._settle_precision()
        fence.mark = world.on_first(fence.claim)
        self.store = CheckpointStore(
            folder.checkpoints_in(recipe.checkpoint.home),
            recipe.checkpoint.keep,
            world,
            keep_every=recipe.checkpoint.keep_every,
            fence=fence.check_everywhere,
        )
        world.on_first(self.store.sweep)
        with torch.device("meta"):
            self.model = build_model(recipe.model)
        self.parameters = self.model.parameter_count()  # while the model is whole
        self._log_first_line()
        self.flops_a_step = 3 * self.model.flops(recipe.model.sequence_length) * recipe.train.global_batch
        self.engine = build_engine(
            recipe.engine.model_copy(update={"precision": self.precision}),
            self.model,
            recipe.optimizer,
            recipe.train.seed,
            world,
            global_batch=recipe.train.global_batch,
            micro_batch=recipe.train.micro_batch,
        )
        record = Record()
        with display.phase("loading the checkpoint") as phase:
            self.checkpoint = self.store.load(self._fragments_of, set_aside=True, progress=phase.update)
        self.unlogged: dict[str, float] = {}
        """The numbers of a step whose validation a stop has cut short. They wait for it in the checkpoint."""
        if self.checkpoint is None:
            with display.phase("making the first weights"):
                self.engine.begin()
                if origin is not None:
                    origin.give(self.engine)
        else:
            state = self.checkpoint.state
            self.unlogged = state.get("unlogged", {})
            self.engine.restore(state["counters"])
            record = Record.from_state(state["reading"])
            if not world.is_first:
                record.digest = Record().digest  # of what this rank reads from here on
        self.reading = Reading(recipe.data, streams, record, recipe.train.global_batch)
        self.saved_step = self.begun_step = self.step
        """Of the newest checkpoint that is on disk, and of the one that was begun last."""
        if world.is_first:
            folder.keep_precision(self.identity, self.precision)
            replace_file(folder.config, recipe.as_yaml())

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.reading.record.step

    @property
    def finished(self) -> bool:
        return self.step >= self.recipe.train.steps

    def go(self) -> int:
        """From the rehearsal to the last word; returns the exit code."""
        recipe = self.recipe
        meter = self._rehearse()
        tracker = self._open_tracker() if self.world.is_first else None
        if tracker is not None:
            self.stop.before_exit.append(lambda code: tracker.close("KILLED", is_hurried=lambda: True))
        loader = Loader(
            self.reading.mixture,
            recipe.loader,
            global_batch=recipe.train.global_batch,
            micro_batch=recipe.train.micro_batch,
            first_sequence=self.reading.record.next_sequence,
            rank=self.world.rank,
            world_size=self.world.size,
            digest=True,
            give_up=lambda: self.stop.signal is not None,
        )
        status = "FAILED"
        try:
            with loader, TrainingProgress(display, recipe.train.steps, self.step) as progress:
                self._forget_logged(tracker)
                if self.checkpoint is None or self.unlogged:
                    self._log_validated(tracker, self.unlogged)
                agreed = self.world.size == 1
                try:
                    self._loop(iter(loader), meter, tracker, progress)
                    agreed = True
                except TrainingError:
                    agreed = True
                    raise
                finally:
                    self.reading.close()  # so that the loader's threads wait for nothing any more
                    # Also where data cannot be read on: no step is lost. But the others must know of it, to take part.
                    if agreed and self.fence.holds:
                        self._save_the_last(tracker)
            self.heartbeat.beat("end", self.step)
            status = "FINISHED" if self.finished and not self.unlogged else "KILLED"
        finally:
            if tracker is not None:
                with display.phase("delivering numbers to MLflow"):
                    tracker.close(status, is_hurried=lambda: self.stop.signal is not None)
        if self.world.size > 1 and meter.peak_memory_by_rank:
            log.info("peak memory by rank: %s", ", ".join(size(peak) for peak in meter.peak_memory_by_rank))
        self.world.gather(None)  # a launcher may end the others as soon as one has ended
        return self._farewell()

    def _loop(
        self, batches: Iterator[Batch], meter: Meter, tracker: Tracker | None, progress: TrainingProgress
    ) -> None:
        recipe = self.recipe
        profiler = StepProfiler(recipe.profile, self.folder.profile_of(self.world.rank), self.engine.device)
        profiler.announce(self.step, recipe.train.steps)
        shown: AbstractContextManager[object] = display.phase(f"the first step{self._compiling}")
        while not self.finished:
            with profiler.step(self.step + 1), shown:
                metrics = self._do_step(batches, meter)
            if metrics is None:
                return
            self.stop.defer()
            shown = nullcontext()
            progress.update(self.step, metrics, meter.seconds_a_step * (recipe.train.steps - self.step))
            if self.finished or self.step % recipe.validation.every == 0:
                self._log_validated(tracker, metrics)
                if self.unlogged:
                    return
            else:
                self._log(tracker, metrics)
            if self.step % recipe.checkpoint.every == 0:
                with contextlib.suppress(CheckpointError):  # it has been told; the run goes on, and tries again
                    self._finish_save()
                with contextlib.suppress(CheckpointError):
                    self._save(tracker)

    def _do_step(self, batches: Iterator[Batch], meter: Meter) -> dict[str, float] | None:
        """A batch and a step of the optimizer; returns their numbers. None: the run is to stop, and did no step."""
        meter.start()
        self.heartbeat.beat("step", self.step)
        batch, masked, data_seconds = self._next_batch(batches, meter)
        if batch is None:
            return None
        rate = learning_rate_at(self.recipe.optimizer, self.step, self.recipe.train.steps)
        result = self._step(batch, rate)
        self.reading.advance(batch)
        metrics = meter.numbers(result, data_seconds)
        metrics |= {"learning_rate": rate, "masked_bytes": masked, "holes": self.reading.holes}
        return metrics | self._epochs()

    def _log(self, tracker: Tracker | None, metrics: dict[str, float]) -> None:
        if tracker is not None:
            self.fence.check()
            self.stop.stand_still_if_ending()
            tracker.log(self.step, metrics)

    def _log_validated(self, tracker: Tracker | None, metrics: dict[str, float]) -> None:
        """Log a step's numbers with those of a validation; a stop during it leaves both to the next start."""
        self.unlogged = {}
        validated: dict[str, float] = {}
        if self.validation is not None:
            try:
                validated = self._validate(self.validation)
            except StoppedError:
                self.unlogged = metrics
                return
        if metrics or validated:
            self._log(tracker, metrics | validated)

    def _forget_logged(self, tracker: Tracker | None) -> None:
        """Drop the numbers that came with the checkpoint where an earlier start has logged them."""
        if self.unlogged and self.world.on_first(lambda: tracker is None or tracker.journal.last_step == self.step):
            self.unlogged = {}

    def _next_batch(self, batches: Iterator[Batch], meter: Meter) -> tuple[Batch | None, int, list[float]]:
        """This rank's part of the next batch; none on all ranks once one of them is asked to stop.

        Returns:
            The batch, the bytes masked in it on all ranks, and the seconds that each rank waited for it.
        Raises:
            TrainingError: a rank cannot read on; on all of them.
        """
        batch, fault = None, None
        try:
            self.fence.look()
            batch = None if self.stop.signal else next(batches, None)  # none when asked to stop while it waited
        except Exception as error:
            if self.world.size == 1:
                raise
            fault = error
        meter.data_is_here()
        stops, faults, masked, data_seconds = zip(
            *self.world.gather_numbers(
                batch is None and fault is None, fault is not None, batch.masked if batch else 0, meter.data_seconds
            ),
            strict=True,
        )
        if any(faults):
            told = self.world.gather(str(fault) if fault else None)
            rank = next(rank for rank, text in enumerate(told) if text is not None)
            raise TrainingError(f"rank {rank} of {self.world.size}: {told[rank]}") from fault
        if any(stops):
            self.stop.signal = signal.Signals(max(self.world.gather(self.stop.signal or 0)))
            batch = None
        return batch, int(sum(masked)), list(data_seconds)

    def _epochs(self) -> dict[str, float]:
        """How often the corpus has been read, or each source of a mixture."""
        epochs = self.reading.epochs()
        return (
            {f"epoch/{name}": epoch for name, epoch in epochs.items()}
            if self.recipe.data.mixture
            else {"epoch": next(iter(epochs.values()))}
        )

    def _step(self, batch: Batch, learning_rate: float) -> StepResult:
        if not self.reading.goes_on:
            self.engine.forget()
        try:
            return self.engine.train_step(
                batch.micro_batches,
                step=self.step,
                learning_rate=learning_rate,
                before_update=self.store.wait_for_copy,
            )
        except NonFiniteError as error:
            raise TrainingError(
                f"step {self.step + 1}, sequences {self.reading.record.next_sequence} to {batch.next_sequence - 1}: "
                f"{error}; no parameter was changed. Try a lower optimizer.learning_rate or a longer warm-up"
            ) from error

    def _validate(self, corpus: Corpus) -> dict[str, float]:
        """Return the bits per byte of a corpus.

        Raises:
            StoppedError: a rank has been asked to stop; on all ranks.
        """
        started = time.perf_counter()
        self.heartbeat.beat("evaluation", self.step)
        rows = self.recipe.train.micro_batch
        vote = Vote(self.stop, self.world)

        def nats_of(ids: Ids) -> Tensor:
            vote.check()
            return self.engine.nats(ids)

        with display.phase("validating", corpus.raw_bytes) as phase:
            part = evaluate(
                nats_of,
                corpus,
                self.recipe.model.sequence_length,
                rows,
                progress=lambda done: phase.advance(done * self.world.size),  # the other ranks' are about as many
                stride=stride_of(self.model),
                rank=self.world.rank,
                world_size=self.world.size,
            )
        total = Score()
        for score in self.world.gather(asdict(part.total)):
            total.add(Score(**score))
        log.info(
            "step %d: validation %.4f bits/byte over %s bytes in %s",
            self.step,
            total.bits_per_byte,
            f"{total.bytes:,}",
            duration(time.perf_counter() - started),
        )
        return {"validation/bits_per_byte": total.bits_per_byte}

    def _save(self, tracker: Tracker | None) -> None:
        self.heartbeat.beat("checkpoint", self.step)
        self.world.on_first(self._end_if_fenced_off)
        if tracker is not None:
            tracker.journal.sync()  # a checkpoint on disk has its numbers on disk
        state = {
            "run": self.identity["id"],
            "reading": merged(self.world.gather(self.reading.state())),
            "fingerprint": self.fingerprint,
            "counters": self.engine.counters(),
            "unlogged": self.unlogged,
            "config": self.recipe.as_tree(),
            "precision": self.precision,
            "environment": environment(),
        }
        self.store.begin(self.step, self.engine.owned_fragments(), state)
        self.begun_step = self.step
        if not self.recipe.checkpoint.asynchronous:
            self._finish_save()

    def _end_if_fenced_off(self) -> None:
        with contextlib.suppress(OSError):  # of a home far away; the save itself will tell
            self.fence.check_everywhere()

    def _finish_save(self) -> None:
        """Waits for the save under way, if there is one.

        Raises:
            CheckpointError: it failed.
        """
        self.heartbeat.beat("checkpoint", self.step)
        try:
            with display.phase(f"waiting for the checkpoint of step {self.begun_step} to be on disk"):
                self.store.finish()
        except CheckpointError:
            self.begun_step = self.saved_step
            raise
        self.saved_step = self.begun_step

    def _save_the_last(self, tracker: Tracker | None) -> None:
        """Leaves no step unsaved; what a save before could not write is tried again.

        Raises:
            CheckpointError: it failed.
        """
        with contextlib.suppress(CheckpointError):  # it has been told
            self._finish_save()
        if self.step != self.saved_step:
            self._save(tracker)
            self._finish_save()

    def _settle_precision(self) -> str:
        """Return the precision of the passes, chosen by the first rank for all."""
        device = choose_device(self.recipe.engine.device, self.world.local_rank)

        def settle() -> str:
            kept = self.folder.earlier_precision(self.identity)
            return choose_precision(self.recipe.engine.precision, device, kept)

        precision: str = self.world.on_first(settle)
        return precision

    def _fragments_of(self, checkpoint: Metadata) -> list[Fragment]:
        """Return what to load from a checkpoint of this run: everything. Raises what `check_resumes` raises."""
        check_resumes(checkpoint, self.recipe, self.fingerprint)
        return self.engine.fragments()

    @property
    def _compiling(self) -> str:
        return ", compiling the blocks" if self.recipe.engine.compile else ""

    def _log_first_line(self) -> None:
        recipe = self.recipe
        log.info(
            "training %s: %s, %s parameters, %s on %s, %s",
            self.folder.path,
            recipe.model.family,
            f"{self.parameters:,}",
            self.precision,
            choose_device(recipe.engine.device, self.world.local_rank),
            f"{recipe.engine.name} of {self.world.size} ranks" if self.world.size > 1 else "one process",
        )

    def _rehearse(self) -> Meter:
        """One made-up micro-batch, before data is touched, and what there is to say at the start."""
        recipe = self.recipe
        started = time.perf_counter()
        with display.phase(f"rehearsing a micro-batch{self._compiling}"):
            self.engine.rehearse(min(recipe.train.micro_batch, recipe.train.global_batch))
        rehearsal = time.perf_counter() - started
        peak = self._measure_peak()
        log.info(
            "micro-batch rehearsed in %.1f s; %s",
            rehearsal,
            "peak unknown, so no MFU" if peak is None else f"peak {peak[0] / 1e12:.3g} TFLOP/s ({peak[1]})",
        )
        log.info("attention: %s", describe_attention(self.engine.device, self.engine.dtype))
        for name, stream in self.reading.mixture.streams.items():
            log.info(
                "%s: %s bytes, %s sequences of %s bytes per epoch; the run reads %.2f epochs",
                f"{name}, {stream.corpus.location}" if recipe.data.mixture else stream.corpus.location,
                f"{stream.corpus.raw_bytes:,}",
                f"{stream.sequences_per_epoch:,}",
                f"{stream.sequence_length:,}",
                self.reading.mixture.epochs(self.reading.sequences_in_all(recipe.train.steps))[name],
            )
        if self.checkpoint is not None:
            log.info("goes on after step %d, from %s", self.step, self.checkpoint.folder)
            for name, now in (("config", recipe.as_tree()), ("environment", environment())):
                for change in changes(self.checkpoint.state[name], now):
                    log.info("changed since that checkpoint: %s", change)
        elif self.origin is not None:
            moments = "" if self.origin.optimizer_steps is None else " and moments"
            log.info("starts with the weights%s of %s", moments, self.origin.checkpoint.folder)
            for difference in self.origin.differences:
                log.info("different from those weights: %s", difference)
        return Meter(self.flops_a_step, None if peak is None else peak[0] * self.world.size)

    def _measure_peak(self) -> tuple[float, str] | None:
        """Return the FLOP/s of one device, and their source; None where it emulates the precision's products."""

        def measure() -> tuple[float, str] | None:
            is_native = self.precision == "fp32" or has_native_bf16(self.engine.device)
            return peak_flops(self.engine.device, self.engine.dtype) if is_native else None

        peak: tuple[float, str] | None = self.world.on_first(measure)
        return peak

    def _open_tracker(self) -> Tracker:
        journal = Journal(self.folder.metrics, self.step if self.checkpoint else None)
        description = RunDescription(
            name=self.recipe.run.name,
            identity=self.identity["id"],
            params=flatten(self.recipe.as_tree()) | {"parameters": self.parameters, "precision": self.precision},
            tags={
                "corpus.fingerprint": self.fingerprint,
                "corpus.content_sha256": " ".join(
                    stream.corpus.content_sha256 for stream in self.reading.mixture.streams.values()
                ),
                "host": platform.node(),
                **environment(),
                **read_source(self.folder.config),
            },
            begins_after=self.step if self.checkpoint else -1,
            start=starts_noted_at(self.folder.generation),
            reason=reason_of_start(self.folder.path, os.environ),
        )
        return open_tracker(
            self.recipe.tracking,
            journal,
            self.folder.mlflow,
            Path(self.recipe.run.root),
            description,
            lambda: self.fence.holds,
            recipe=self.folder.config,
            train_log=self.folder.log_of(0),
        )

    def _farewell(self) -> int:
        if self.finished and not self.unlogged:
            log.info("finished at step %d; all files are in %s", self.step, self.folder.path)
            return 0
        assert self.stop.signal is not None
        log.info(
            "%s: stopped after step %d of %d, with %s checkpoint; the same command resumes from there",
            self.stop.signal.name,
            self.step,
            self.recipe.train.steps,
            "a" if self.step else "no",
        )
        return 128 + self.stop.signal


def _check_same_recipe(recipe: Recipe, world: World) -> None:
    """Raises TrainingError if another rank was started with another recipe."""
    trees = world.gather(recipe.as_tree())
    for rank, tree in enumerate(trees):
        if differences := changes(trees[0], tree):
            raise TrainingError(f"rank {rank} was started with another recipe than rank 0: {'; '.join(differences)}")


def _find_origin(recipe: Recipe, folder: RunFolder, world: World) -> Origin | None:
    """What a new run begins with; None if that is first values, or the run goes on from a checkpoint of its own."""
    if recipe.initialize.weights is None or world.on_first(lambda: _has_checkpoint(recipe, folder)):
        return None
    with torch.device("meta"):
        model = build_model(recipe.model)
    with display.phase(f"verifying {recipe.initialize.weights}") as phase:
        return find_origin(recipe.initialize, recipe.model, model, recipe.optimizer.name, world, phase.update)


def _has_checkpoint(recipe: Recipe, folder: RunFolder) -> bool:
    """Whether there is one, which need not be valid."""
    return bool(CheckpointStore(folder.checkpoints_in(recipe.checkpoint.home), keep=None).committed())


def check_same_run(folder: Path, began: Mapping[str, Any], recipe: Recipe, fingerprint: str) -> None:
    """Check that a start has the model and the stream of bytes that its run folder began with.

    Args:
        began: the run's identity; see `RunFolder.identity`.
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


def check_resumes(checkpoint: Metadata, recipe: Recipe, fingerprint: str) -> None:
    """Check that a recipe can continue from a checkpoint.

    Raises:
        CheckpointError: it is of another stream of bytes, which a new run folder does not know; or of another
            optimizer. Moments are one optimizer's; its rates and decays may change.
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


@contextmanager
def _log_to(path: Path, fence: Fence) -> Iterator[None]:
    """Writes what is logged, with the progress lines that a terminal does not show, to a file too."""
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(lambda record: fence.holds)
    loggers = [logging.getLogger(name) for name in ("pretrain", "data_pipeline")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    except Exception:
        log.debug("it cannot go on", exc_info=True)  # in the file; the terminal is told in a line
        raise
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()
