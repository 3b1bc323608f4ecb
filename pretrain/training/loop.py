"""The training loop.

    Reading ─▶ Loader ─▶ Engine.train_step ─▶ numbers ─▶ callbacks: tracking, validation, checkpoint, …

Every rank runs this loop. The ranks agree on whether all have data for a step and none is asked to stop, so all end at
the same step. They also agree on the damaged blocks that its batch skips. Their votes travel with the numbers of the
step before (agreement.py). Only the first rank writes numbers.

starting/ prepares a run; callbacks/base.py lists the events that this file calls.
"""

import gc
import logging
from collections.abc import Mapping

from data_pipeline.errors import CorpusError
from pretrain.checkpoint import NotFiniteError
from pretrain.distributed.world import ALONE, COLLECTIVE_TIMEOUT, STEP_TIMEOUT, World
from pretrain.engines import NonFiniteError, StepResult
from pretrain.optim import learning_rate_at
from pretrain.terminal.progress import size
from pretrain.training.agreement import AgreedBatch, AgreedBatches, data_seconds_of
from pretrain.training.callbacks import CallbackList
from pretrain.training.config import TrainingRecipe
from pretrain.training.health.response import BadBatch, respond_to_batch, respond_to_values
from pretrain.training.run import TrainingError, TrainingRun
from pretrain.training.starting.start import start
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
        stop: request that may come at any time. Without it, the run cannot be stopped.

    Raises:
        TrainingError, CorpusError, EngineError, CheckpointError, RunFolderError, WorldError: the run cannot start or
            continue; the message says why.
    """
    stop = stop or StopRequest()
    while (decision := _train_from_newest(recipe, world, source or {}, stop)).rewinds:
        gc.collect()  # frees the model before the next start makes one
    return decision.exit_code


def _train_from_newest(recipe: TrainingRecipe, world: World, source: Mapping[str, str], stop: StopRequest) -> Decision:
    """Make one start of a run; return the decision that ended it."""
    callbacks = CallbackList(recipe)
    with start(recipe, world, source, stop) as run:
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
        return decision


def _train(run: TrainingRun, callbacks: CallbackList) -> Decision:
    """Take the steps of a start; let callbacks save on every end at which all ranks are at the same step."""
    callbacks.on_start(run)
    decision = CONTINUE
    try:
        with run.loader:
            all_are_here = run.world.size == 1
            try:
                decision = _take_steps(run, callbacks)
                all_are_here = True
            except (TrainingError, NotFiniteError):
                all_are_here = True
                raise
            finally:
                run.reading.close()  # so that the loader's threads stop waiting
                if all_are_here and run.fence.holds:
                    callbacks.on_stop(run)
    except NotFiniteError as error:
        if decision is not FINISHED:
            raise
        return respond_to_values(run, error)  # the last save found them
    return decision


def _take_steps(run: TrainingRun, callbacks: CallbackList) -> Decision:
    """Take steps until all are done, or a rank is asked to stop."""
    decision = CONTINUE
    if run.checkpoint is None or run.unlogged:
        decision = _publish(run, callbacks, run.unlogged)
    run.world.limit_device_waits(COLLECTIVE_TIMEOUT)  # the first step may compile
    batches, is_first = AgreedBatches(run), True
    while decision is CONTINUE and not run.is_done:
        callbacks.before_step(run)
        run.meter.start()
        numbers = _take_step(run, batches)
        if isinstance(numbers, Decision):
            decision = numbers
            continue
        if is_first:
            is_first = False
            run.world.limit_device_waits(STEP_TIMEOUT)
            if not numbers["bytes_per_second"]:
                objective = run.recipe.objective
                log.warning(
                    "step %d has no %s to learn; model.sequence_length %d may cut off what objective.name %s predicts",
                    run.step,
                    objective.entry.unit,
                    run.recipe.model.sequence_length,
                    objective.name,
                )
        run.stop.defer()
        callbacks.after_step(run, numbers)
        decision = _publish(run, callbacks, numbers)
    return FINISHED if decision is CONTINUE else decision


def _publish(run: TrainingRun, callbacks: CallbackList, numbers: dict[str, float]) -> Decision:
    """Complete the numbers of a step and let callbacks log them; a stop or a fault leaves both to the next start."""
    run.unlogged = {}
    try:
        callbacks.measure(run, numbers)
    except (StoppedError, TrainingError, CorpusError) as error:
        run.unlogged = numbers
        if isinstance(error, StoppedError):
            return Decision.stopped_by(error.signal)
        raise
    if numbers:
        callbacks.on_numbers(run, numbers)
    return CONTINUE


def _take_step(run: TrainingRun, batches: AgreedBatches) -> dict[str, float] | Decision:
    """Take an optimizer step, and return its numbers; or the decision to end, or to continue without a bad batch.

    Raises:
        TrainingError, NotFiniteError: the run stops because of its health; on all ranks.
    """
    try:
        batch = batches.next()
    except NotFiniteError as error:
        return respond_to_values(run, error)
    if isinstance(batch, Decision):
        return batch
    rate = learning_rate_at(run.recipe.optimizer, run.step, run.recipe.train.steps)
    rate *= run.health.rate_factor(run.step + 1)
    if not run.reading.goes_on:
        run.engine.forget()
    look_ahead = batches.look_ahead if run.world.size > 1 and run.steps_left > 1 else None
    try:
        result = run.engine.train_step(
            batch.own.micro_batches,
            step=run.step,
            learning_rate=rate,
            before_update=run.store.wait_for_copy,
            sources=run.reading.sources_of(batch.own),
            limits=run.health.limits,
            look_ahead=look_ahead,
            diagnose=_is_diagnosed(run),
        )
    except NonFiniteError as error:
        return respond_to_batch(run, BadBatch(batch.own, error.result, str(error)))
    if not result.is_updated:
        return respond_to_batch(run, BadBatch(batch.own, result))
    if look_ahead is not None:
        batches.heard(result)
    run.health.accept(result, len(run.reading.record.stages))
    return _numbers_of_step(run, batch, result, rate)


def _is_diagnosed(run: TrainingRun) -> bool:
    """Return whether the next step has norms by layer and gradient noise."""
    every = run.recipe.diagnostics.every
    return every > 0 and (run.step + 1) % every == 0


def _numbers_of_step(run: TrainingRun, batch: AgreedBatch, result: StepResult, rate: float) -> dict[str, float]:
    """Record that a step has used its batch, and return the step's numbers."""
    weights = run.reading.weights
    run.reading.advance(batch.own)
    data_seconds = data_seconds_of(result.upcoming) if any(result.upcoming) else batch.data_seconds
    numbers = run.meter.numbers(result, data_seconds, list(run.reading.mixture.streams))
    numbers |= {"learning_rate": rate, "masked_bytes": batch.masked, "holes": run.reading.holes}
    numbers |= run.health.numbers(run.step) | dict(result.diagnosis) | dict(result.patches)
    if skipped := run.reading.skips.before(run.reading.record.next_sequence):
        numbers["health/skipped_sequences"] = skipped
    epochs = run.reading.epochs()  # of each source of a mixture
    if run.recipe.data.mixture:
        numbers |= {f"weight/{name}": weight for name, weight in weights.items()}
        return numbers | {f"epoch/{name}": epoch for name, epoch in epochs.items()}
    return numbers | {"epoch": next(iter(epochs.values()))}


def _log_end(run: TrainingRun, decision: Decision) -> None:
    if decision.rewinds:
        return
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
