"""Start of a run with regard to its health: what it takes up from its events and its checkpoint."""

from collections.abc import Sequence
from typing import Any

from data_pipeline.stream.record import Record
from data_pipeline.stream.skips import Skips
from pretrain.checkpoint import CheckpointStore, Metadata
from pretrain.distributed.world import World
from pretrain.training.health.config import HealthConfig
from pretrain.training.health.events import HealthEvent, HealthLog
from pretrain.training.health.monitor import Monitor
from pretrain.training.run_folder import RunFolder


def rewinds_of(log: HealthLog) -> list[HealthEvent]:
    """Return the rewinds of a run, oldest first, with the stops that lead back to an earlier checkpoint."""
    return [event for event in log.read() if event.to_step is not None]


def steps_left(store: CheckpointStore, rewinds: Sequence[HealthEvent]) -> dict[int, HealthEvent]:
    """Return the steps of the checkpoints that the run has left by a rewind, each with the rewind.

    Such a checkpoint is of a later step than the one that the run was rewound to, and does not know of the rewind.
    """
    left: dict[int, HealthEvent] = {}
    for state in store.states() if rewinds else ():
        step = state["reading"]["step"]
        for event in rewinds:
            if step > (event.to_step or 0) and not event.is_known_to(state):
                left.setdefault(step, event)
    return left


def quarantine_left(store: CheckpointStore, rewinds: Sequence[HealthEvent]) -> None:
    """Quarantine the checkpoints that the run has left by a rewind. The first rank calls this."""
    for step, event in steps_left(store, rewinds).items():
        store.set_aside(store.path(step).name, f"the run was rewound to an earlier step. {event.text}")


def take_up_rewinds(folder: RunFolder, store: CheckpointStore, world: World) -> list[HealthEvent]:
    """Return the rewinds of the run. Quarantine the checkpoints that it has left, and drop events to decide again."""

    def find() -> list[dict[str, Any]]:
        log = HealthLog(folder.health)
        rewinds = rewinds_of(log)
        quarantine_left(store, rewinds)
        log.keep_until(next(store.states(), {}))
        return [event.as_json() for event in rewinds]

    return [HealthEvent(**event) for event in world.on_first(find)]


def record_of(checkpoint: Metadata | None, rewinds: Sequence[HealthEvent], world: World) -> Record:
    """Return the record of what the run has read, with the sequences that its rewinds skip."""
    record = Record() if checkpoint is None else Record.from_state(checkpoint.state["reading"])
    skipped = [each for event in rewinds if event.action == "rewind" for each in event.sequences]
    record.skipped = Skips([*record.skipped, *skipped]).ranges
    if not world.is_first:
        record.digest = Record().digest  # covers what this rank reads from here on
    return record


def monitor_of(config: HealthConfig, checkpoint: Metadata | None, rewinds: Sequence[HealthEvent]) -> Monitor:
    """Return the monitor of a start."""
    return Monitor(config, {} if checkpoint is None else checkpoint.state.get("health", {}), rewinds)
