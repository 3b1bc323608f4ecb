"""Response to a bad batch: skip it, rewind the run, or stop it with evidence. All ranks call these functions together.

The first rank decides, stores the event and tells the others. A rewind is a new start in the same processes: start.py
quarantines the checkpoints after the one that the run resumes from, and the journal and trackers continue there.
"""

import logging
import math
import time
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import numpy as np

from byteloom.core.storage.step_folders import step_in
from byteloom.core.text import count
from data_pipeline.errors import CorpusError
from data_pipeline.stream.inspection.explain import explain
from data_pipeline.stream.loader import Batch
from data_pipeline.stream.reading import Reading
from data_pipeline.stream.skips import Skips
from pretrain.checkpoint import NotFiniteError
from pretrain.engines import RowLoss, StepResult
from pretrain.training.health.events import HealthEvent, HealthLog, Kind, SuspectRow, or_null
from pretrain.training.health.monitor import bits_per_byte
from pretrain.training.health.rewind import quarantine_left
from pretrain.training.run import TrainingError, TrainingRun
from pretrain.training.stop import CONTINUE, REWIND, Decision

log = logging.getLogger(__name__)

SUSPECTS = 4
"""Rows of a bad batch that an event names."""
DEVIATIONS = {"loss": "health.loss_deviations", "gradient_norm": "health.norm_deviations"}
"""Field of the recipe that sets the limit of a spike, by the kind of the event."""


class BadBatch(NamedTuple):
    """A batch whose update was not done."""

    batch: Batch
    """This rank's part."""
    result: StepResult
    fault: str = ""
    """Description of a gradient that is not finite; empty for a spike."""


def respond_to_batch(run: TrainingRun, bad: BadBatch) -> Decision:
    """Act on a bad batch; return the decision to continue with the next batch, or to rewind.

    Raises:
        TrainingError: the run stops; on all ranks.
    """
    event = _agreed(run, lambda: _event_of_batch(run, bad))
    if event.action == "stop":
        _stop(run, event)
    if event.action == "rewind":
        return _rewind(run)
    run.reading.leave_out(bad.batch)
    end = run.reading.sequences_in_all(run.recipe.train.steps)
    run.loader.without(run.reading.skips).until(end).read_again(run.reading.record.next_sequence)
    return CONTINUE


def respond_to_values(run: TrainingRun, error: NotFiniteError) -> Decision:
    """Act on values that a save found not finite; return the decision to rewind.

    Raises:
        NotFiniteError: the run stops; on all ranks.
    """
    event = _agreed(run, lambda: _event(run, "values", f"after step {run.step}: {error}"))
    if event.action == "stop":
        raise error
    return _rewind(run)


def _agreed(run: TrainingRun, find: Callable[[], HealthEvent]) -> HealthEvent:
    """Return the event that the first rank finds. It is stored before any rank acts on it."""

    def store() -> dict[str, Any]:
        event = find()
        run.fence.check()
        HealthLog(run.folder.health).append(event)
        return event.as_json()

    event = HealthEvent(**run.world.on_first(store))
    run.health.events.append(event)
    if run.world.is_first and event.action != "stop":
        log.warning("%s", event.text)
    return event


def _event_of_batch(run: TrainingRun, bad: BadBatch) -> HealthEvent:
    kind: Kind
    if bad.fault:
        kind, found = "non_finite", bad.fault
    else:
        kind, found = run.health.describe(bad.result)
    first, end = int(run.reading.skips.take(run.reading.record.next_sequence, 0)), bad.batch.next_sequence
    numbers = {
        "bits_per_byte": or_null(bits_per_byte(bad.result)),
        "gradient_norm": or_null(bad.result.gradient_norm),
        "sequences": [(first, end - first)],
        "rows": _suspects(run.reading, bad.result.rows),
    }
    return _event(run, kind, f"step {run.step + 1}, sequences {first} to {end - 1}: {found}", **numbers)


def _event(run: TrainingRun, kind: Kind, found: str, **fields: Any) -> HealthEvent:
    """Return the event of what was found, with the action about it."""
    config, health, step = run.recipe.health, run.health, run.step + 1
    action, to_step = health.action(kind, step), None
    if action == "rewind":
        to_step = _rewind_step(run, kind)
        action = "stop" if to_step is None else action
    elif action == "stop" and health.vain_rewind(run.step):
        to_step = _rewind_step(run, kind)
    fields |= {"id": uuid.uuid4().hex[:12], "time": time.time(), "step": step, "kind": kind, "action": action}
    if action == "skip":
        return HealthEvent(
            **fields, text=f"{found}; update skipped ({health.recent_skips(step) + 1} of {config.skips})"
        )
    if action == "stop":
        return HealthEvent(**fields, to_step=to_step, text=found)
    skipped = Skips([*run.reading.record.skipped, *fields.get("sequences", [])]).ranges
    place = f"step {to_step}" if to_step else "the beginning"
    text = f"{found}; the run rewinds to {place} ({health.rewinds + 1} of {config.rewinds})"
    if skipped:
        text += f", without {count(sum(length for _, length in skipped), 'sequence')}"
    fields |= {"sequences": skipped, "to_step": to_step}
    if kind != "values" and config.rate_factor != 1:
        factor, until = config.rate_factor * health.rate_factor(step), step + config.rate_steps
        text += f", at {factor:g} times the learning rate until step {until}"
        fields |= {"rate_factor": factor, "rate_until": until}
    return HealthEvent(**fields, text=text)


def _rewind_step(run: TrainingRun, kind: Kind) -> int | None:
    """Return the step to rewind to, which is not before a branch began, nor before the optimizer's recipe changed.

    Trouble after a changed recipe says nothing against the checkpoint to which the change was made.
    """
    optimizer = run.recipe.as_tree()["optimizer"]
    changed = (state["reading"]["step"] for state in run.store.states() if state["config"]["optimizer"] != optimizer)
    floor = max([*(ancestor["step"] for ancestor in run.ancestry), next(changed, 0)])
    return run.health.rewind_step(kind, run.step, [step_in(path.name) for path in run.store.committed()], floor)


def _rewind(run: TrainingRun) -> Decision:
    run.health.is_rewinding = True
    return REWIND


def _stop(run: TrainingRun, event: HealthEvent) -> NoReturn:
    """End the run, and have its weights saved as a post-mortem. Checkpoints after a rewind in vain are quarantined.

    Raises:
        TrainingError: always, with what was found, what the weights are, and what a person can do.
    """
    run.has_diverged = True
    values = run.store.describe_values(run.step, run.engine.owned_fragments())
    saved = run.store.finite_step
    kept = "" if saved == run.step else f"Step {run.step} is kept as a post-mortem only. "
    if event.to_step is not None:
        run.world.on_first(lambda: quarantine_left(run.store, [event]))
        saved = event.to_step
    then = f"resumes after step {saved}" if saved else "begins at step 1"
    advice = "try a lower optimizer.learning_rate or a longer warm-up"
    if event.kind in DEVIATIONS:
        advice = (
            f"look at the rows that `byteloom health {run.folder.path}` names. If they are as they should be, raise "
            f"{DEVIATIONS[event.kind]}, or set health.spike=ignore; else {advice}"
        )
    raise TrainingError(f"{event.text}; {values}. {kept}{advice[0].upper()}{advice[1:]}: the next start {then}")


def _suspects(reading: Reading, rows: list[RowLoss]) -> list[SuspectRow]:
    """Return the rows with the highest loss, with their documents."""
    losses = [(row, nats / max(target_bytes, 1) / math.log(2)) for row, nats, target_bytes in rows]
    losses.sort(key=lambda row: -row[1] if math.isfinite(row[1]) else -math.inf)
    sequences = reading.skips.take(reading.record.next_sequence, np.arange(len(rows))).tolist()
    return [
        SuspectRow(
            row=row,
            sequence=sequences[row],
            bits_per_byte=or_null(loss),
            documents=_documents(reading, sequences[row]),
        )
        for row, loss in losses[:SUSPECTS]
    ]


def _documents(reading: Reading, sequence: int) -> list[str]:
    """Return the keys of the documents of a sequence; none if they cannot be read, which is logged."""
    try:
        return list(dict.fromkeys(origin.key for origin in explain(reading.mixture, sequence)))
    except CorpusError as error:
        log.warning("the documents of sequence %d are not known: %s", sequence, error)
        return []
