"""The training loop.

    Reading ─▶ Loader ─▶ Engine.train_step ─▶ numbers ─▶ callbacks: tracking, validation, checkpoint, …

Every rank runs this loop. Before each step the ranks agree on whether all have data and none is asked to stop, so all
end at the same step. Only the first rank writes numbers.

start.py prepares a run; callbacks/base.py lists the events that this file calls.
"""

import logging
import signal
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from data_pipeline.stream.loader import Batch
from pretrain.distributed.world import ALONE, World
from pretrain.engines import NonFiniteError
from pretrain.optim import learning_rate_at
from pretrain.terminal.progress import size
from pretrain.training.callbacks import CallbackList
from pretrain.training.config import TrainingRecipe
from pretrain.training.run import TrainingError, TrainingRun
from pretrain.training.start import start
from pretrain.training.stop import CONTINUE, FINISHED, Decision, StoppedError, StopRequest

log = logging.getLogger(__name__)


def train(
    recipe: TrainingRecipe,
    world: World = ALONE,
    source: Mapping[str, str] | None = None,
    stop: StopRequest | None = None,
) -> int:
    """Train the run that a recipe describes, from its newest checkpoint on; return the process's exit code.

    Args:
        recipe: of the run.
        world: the ranks of the run.
        source: tags that say where the recipe and the code come from; see provenance.py.
        stop: a request that may come at any time; none can come if left out.

    Raises:
        TrainingError, CorpusError, EngineError, CheckpointError, RunFolderError, WorldError: the run cannot start or
            continue; the message says why.
    """
    callbacks = CallbackList(recipe)
    with start(recipe, world, source or {}, stop or StopRequest()) as run:
        status = "FAILED"
        try:
            decision = _train(run, callbacks)
            status = decision.status
        finally:
            callbacks.on_end(run, status)
        if world.size > 1 and run.meter.peak_memory_by_rank:
            log.info("peak memory by rank: %s", ", ".join(size(peak) for peak in run.meter.peak_memory_by_rank))
        world.gather(None)  # a launcher may end the others as soon as one has ended
        _log_end(run, decision)
        return decision.exit_code


def _train(run: TrainingRun, callbacks: CallbackList) -> Decision:
    """Take the steps of a start; let callbacks save on every end at which all ranks are at the same step."""
    callbacks.on_start(run)
    with run.loader:
        all_are_here = run.world.size == 1
        try:
            decision = _take_steps(run, callbacks, iter(run.loader))
            all_are_here = True
        except TrainingError:
            all_are_here = True
            raise
        finally:
            run.reading.close()  # so that the loader's threads stop waiting
            if all_are_here and run.fence.holds:
                callbacks.on_stop(run)
    return decision


def _take_steps(run: TrainingRun, callbacks: CallbackList, batches: Iterator[Batch]) -> Decision:
    """Take steps until all are done, or a rank is asked to stop."""
    decision = CONTINUE
    if run.checkpoint is None or run.unlogged:
        decision = _publish(run, callbacks, run.unlogged)
    while decision is CONTINUE and not run.is_done:
        callbacks.before_step(run)
        run.meter.start()
        batch = _next_batch(run, batches)
        if isinstance(batch, Decision):
            return batch
        numbers = _take_step(run, batch)
        run.stop.defer()
        callbacks.after_step(run, numbers)
        decision = _publish(run, callbacks, numbers)
    return FINISHED if decision is CONTINUE else decision


def _publish(run: TrainingRun, callbacks: CallbackList, numbers: dict[str, float]) -> Decision:
    """Complete the numbers of a step and let callbacks log them; a stop leaves both to the next start."""
    run.unlogged = {}
    try:
        callbacks.measure(run, numbers)
    except StoppedError as stopped:
        run.unlogged = numbers
        return Decision.stopped_by(stopped.signal)
    if numbers:
        callbacks.on_numbers(run, numbers)
    return CONTINUE


class AgreedBatch(NamedTuple):
    """Batch whose parts all ranks have."""

    own: Batch
    """Part of this rank."""
    masked: int
    """Bytes masked in it, on all ranks."""
    data_seconds: list[float]
    """Seconds that each rank waited for it."""


def _next_batch(run: TrainingRun, batches: Iterator[Batch]) -> AgreedBatch | Decision:
    """Return the next batch; on all ranks the decision to stop once one of them is asked to.

    Raises:
        TrainingError: a rank cannot read any further; on all of them.
    """
    batch, fault = None, None
    try:
        run.fence.look()
        batch = None if run.stop.signal else next(batches, None)  # None if asked to stop while it waited
    except Exception as error:
        if run.world.size == 1:
            raise
        fault = error
    run.meter.data_is_here()
    stops, faults, masked, data_seconds = zip(
        *run.world.gather_numbers(
            batch is None and fault is None, fault is not None, batch.masked if batch else 0, run.meter.data_seconds
        ),
        strict=True,
    )
    if any(faults):
        texts = run.world.gather(str(fault) if fault else None)
        rank = next(rank for rank, text in enumerate(texts) if text is not None)
        raise TrainingError(f"rank {rank} of {run.world.size}: {texts[rank]}") from fault
    if batch is None or any(stops):
        run.stop.signal = signal.Signals(max(run.world.gather(run.stop.signal or 0)))
        return Decision.stopped_by(run.stop.signal)
    return AgreedBatch(batch, int(sum(masked)), list(data_seconds))


def _take_step(run: TrainingRun, batch: AgreedBatch) -> dict[str, float]:
    """Take an optimizer step, and return its numbers.

    Raises:
        TrainingError: the gradient is not finite; no parameter was changed.
    """
    rate = learning_rate_at(run.recipe.optimizer, run.step, run.recipe.train.steps)
    if not run.reading.goes_on:
        run.engine.forget()
    try:
        result = run.engine.train_step(
            batch.own.micro_batches,
            step=run.step,
            learning_rate=rate,
            before_update=run.store.wait_for_copy,
        )
    except NonFiniteError as error:
        raise TrainingError(
            f"step {run.step + 1}, sequences {run.reading.record.next_sequence} to {batch.own.next_sequence - 1}: "
            f"{error}; no parameter was changed. Try a lower optimizer.learning_rate or a longer warm-up"
        ) from error
    run.reading.advance(batch.own)
    numbers = run.meter.numbers(result, batch.data_seconds)
    numbers |= {"learning_rate": rate, "masked_bytes": batch.masked, "holes": run.reading.holes}
    epochs = run.reading.epochs()  # of each source of a mixture
    if run.recipe.data.mixture:
        return numbers | {f"epoch/{name}": epoch for name, epoch in epochs.items()}
    return numbers | {"epoch": next(iter(epochs.values()))}


def _log_end(run: TrainingRun, decision: Decision) -> None:
    if decision.signal is None:
        log.info("finished at step %d; all files are in %s", run.step, run.folder.path)
        return
    log.info(
        "%s: stopped after step %d of %d, with %s checkpoint; the same command resumes from there",
        decision.signal.name,
        run.step,
        run.recipe.train.steps,
        "a" if run.step else "no",
    )
