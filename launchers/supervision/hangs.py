"""Detection of hung ranks by their heartbeats."""

import time
from pathlib import Path

from launchers.supervision.heartbeat import Beat, Phase, read_beat, stack_of
from launchers.supervision.plan import SuperviseConfig
from launchers.supervision.site import Ending

STACK_SECONDS = 10.0
"""Time that ranks have to write their stacks before they are killed."""


class HangDetector:
    """Watches the heartbeats of a start. It looks only at whether they change: clocks of nodes do not matter.

    Args:
        folder: folder of the heartbeats.
        size: number of ranks.
        config: limits of the phases.
    """

    def __init__(self, folder: Path, size: int, config: SuperviseConfig) -> None:
        self._folder, self._config = folder, config
        self._seen: list[tuple[Beat | None, float]] = [(None, time.monotonic())] * size
        """Last heartbeat of each rank, and the time at which it was first seen."""

    def has_hung(self) -> bool:
        """Return whether a rank has had no heartbeat for longer than its phase allows."""
        return any(silence > self._config.seconds_of(phase) for _, phase, silence in self._silences())

    def _silences(self) -> list[tuple[int, Phase, float]]:
        """Return each rank with the phase of its last heartbeat and the seconds since then."""
        now = time.monotonic()
        for rank, (earlier, _) in enumerate(self._seen):
            beat = read_beat(self._folder, rank)
            if beat != earlier:
                self._seen[rank] = (beat, now)
        return [(rank, beat.phase if beat else "start", now - since) for rank, (beat, since) in enumerate(self._seen)]

    def wait_for_stacks(self) -> None:
        """Wait until the ranks that can answer SIGQUIT have written their stacks."""
        deadline = time.monotonic() + STACK_SECONDS
        while len(self._without_stack()) == len(self._seen) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1.0)

    def _without_stack(self) -> list[int]:
        return [rank for rank in range(len(self._seen)) if not _has_text(stack_of(self._folder, rank))]

    def describe(self) -> Ending:
        """Return which rank hangs, after all ranks were asked for their stacks.

        When one rank hangs, the others wait for it in a collective. A rank that was stopped, or sleeps in the kernel,
        writes no stack. If all ranks wrote one, it is the rank whose last heartbeat is oldest.
        """
        mute = self._without_stack()
        silences = self._silences()
        candidates = (silences[rank] for rank in mute or range(len(silences)))
        rank, phase, silence = max(candidates, key=lambda candidate: candidate[2])
        beat = self._seen[rank][0]
        node = beat.node if beat else ""
        at = f"in phase {phase} after step {beat.step}" if beat else "before its first heartbeat"
        answer = " and does not answer" if rank in mute else ""
        return Ending(
            "failed",
            f"rank {rank}{f' on {node}' if node else ''} hangs {at}: no heartbeat for {silence:.0f} s "
            f"(limit: supervise.{'checkpoint' if phase == 'end' else phase}_seconds){answer}",
            node,
            rank,
        )


def _has_text(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0
