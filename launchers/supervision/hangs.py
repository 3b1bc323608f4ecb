"""Detection of hung ranks by their heartbeats."""

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from launchers.supervision.causes import Fault
from launchers.supervision.heartbeat import BEATS_A_SECOND, Beat, Phase, probe, read_beat, stack_of
from launchers.supervision.plan import SuperviseConfig
from launchers.supervision.site import Ending

STACK_SECONDS = 5.0
"""Time that ranks have to write their stacks before they are killed."""
OTHER_STACKS_SECONDS = 2.0
"""Time that the other ranks have once one has written its stacks. All ranks are asked in one moment."""
STACK_POLL_SECONDS = 0.1
"""Time between two looks at the files of stacks."""
NOTICE_SECONDS = 60.0
"""Time without a step before a notice to a person, or half of `supervise.step_seconds` if that is less."""
GAP_SECONDS = 5.0
"""Time between two looks after which this process itself was stopped, or twice `supervise.step_seconds` if that is
less. Looks are about a second apart."""

log = logging.getLogger(__name__)


class _Silence(NamedTuple):
    rank: int
    phase: Phase
    seconds: float
    """Time since the last heartbeat."""


class HangDetector:
    """Watches the heartbeats of a start. It looks only at whether they change: clocks of nodes do not matter.

    Silence is no evidence after a time in which the watcher was stopped too, such as `scontrol suspend`, and while the
    folder takes no files, such as on a full disk. All clocks start again then.

    Args:
        folder: folder of the heartbeats.
        size: number of ranks.
        config: limits of the phases.
        ask: sends SIGQUIT to all ranks, which then write their stacks.
    """

    def __init__(self, folder: Path, size: int, config: SuperviseConfig, ask: Callable[[], None]) -> None:
        self._folder, self._config, self._ask = folder, config, ask
        self._seen: list[tuple[Beat | None, float]] = [(None, time.monotonic())] * size
        """Last heartbeat of each rank, and the time at which it was first seen."""
        self._read = float("-inf")
        """Time at which the heartbeats were read."""
        self._seconds = size / BEATS_A_SECOND if size > BEATS_A_SECOND else 0.0
        """Least seconds between two readings: ranks of a large run do not write more often."""
        self._looked = time.monotonic()
        """Time of the last look."""
        self._stack_sizes = [0] * size
        """Sizes of the files of stacks before the ranks were asked."""
        self._notice_after = min(NOTICE_SECONDS, config.step_seconds / 2)
        """Silence in a step before the next notice to a person. It doubles with each notice."""

    def has_hung(self) -> bool:
        """Return whether a rank has had no heartbeat for longer than its phase allows. Call it about once a second."""
        gap = time.monotonic() - self._looked
        if gap > min(GAP_SECONDS, 2 * self._config.step_seconds):
            log.info("this process was stopped for %.0f s; the time without heartbeats is counted from now", gap)
            self._restart_clocks()
        silences = self._silences()
        has_hung = any(each.seconds > self._config.seconds_of(each.phase) for each in silences)
        if has_hung and (fault := self._fault_of_folder()):
            log.warning("no heartbeat can be written, so silence does not count: %s", fault)
            self._restart_clocks()
            has_hung = False
        self._looked = time.monotonic()
        return has_hung

    def notice(self) -> str:
        """Return a line about ranks that take no step for a while; empty if there is nothing new to say."""
        silences = self._silences()
        least = min(each.seconds for each in silences)
        phases = {each.phase for each in silences}
        if least <= self._notice_after or "step" not in phases or phases & {"start", "end"}:
            return ""
        self._notice_after *= 2
        mute = self._asked()
        awaited = mute or [self._oldest(list(range(len(silences)))).rank]
        ranks = f"rank{'s' if len(awaited) > 1 else ''} {', '.join(map(str, awaited))}"
        answer = "" if not mute else ", which does not answer" if len(mute) == 1 else ", which do not answer"
        self._looked = time.monotonic()
        return f"no step for {least:.0f} s, waiting for {ranks}{answer}"

    def examine(self) -> Ending:
        """Let all ranks write their stacks; return which rank hangs.

        When one rank hangs, the others wait for it in a collective. A rank that was stopped, or sleeps in the kernel,
        writes no stack. If all ranks answer, the rank whose last heartbeat is oldest is named.
        """
        silences = self._silences()
        mute = self._asked()
        rank = self._oldest(mute or list(range(len(silences)))).rank
        _, phase, silence = silences[rank]
        beat = self._seen[rank][0]
        node = beat.node if beat else ""
        at = f"in phase {phase} after step {beat.step}" if beat else "before its first heartbeat"
        answer = " and does not answer" if mute else ""
        return Ending(
            "failed",
            f"rank {rank}{f' on {node}' if node else ''} hangs {at}: no heartbeat for {silence:.0f} s "
            f"(limit: supervise.{'checkpoint' if phase == 'end' else phase}_seconds){answer}",
            node,
            rank,
            self._fault(mute),
        )

    def _fault(self, mute: list[int]) -> Fault:
        """Return the class of a hang by the ranks that do not answer. On two nodes at once, it is what they share."""
        nodes = {beat.node for rank in mute if (beat := self._seen[rank][0])}
        return "code" if not mute else "node" if len(nodes) < 2 else "storage"

    def _silences(self) -> list[_Silence]:
        """Return each rank with the phase of its last heartbeat and the seconds since then."""
        now = time.monotonic()
        if now - self._read >= self._seconds:
            self._read = now
            for rank, (earlier, _) in enumerate(self._seen):
                beat = read_beat(self._folder, rank)
                if beat != earlier:
                    self._seen[rank] = (beat, now)
        return [
            _Silence(rank, beat.phase if beat else "start", now - since)
            for rank, (beat, since) in enumerate(self._seen)
        ]

    def _oldest(self, ranks: list[int]) -> _Silence:
        return max((each for each in self._silences() if each.rank in ranks), key=lambda each: each.seconds)

    def _restart_clocks(self) -> None:
        now = time.monotonic()
        self._seen = [(beat, now) for beat, _ in self._seen]

    def _fault_of_folder(self) -> str:
        """Return why no heartbeat can be written; empty if one can, or if the folder is gone."""
        try:
            probe(self._folder)
        except FileNotFoundError:
            return ""
        except OSError as error:
            return str(error)
        return ""

    def _asked(self) -> list[int]:
        """Ask all ranks for their stacks; return those that write none."""
        self._stack_sizes = [self._stack_size(rank) for rank in range(len(self._seen))]
        self._ask()
        deadline = time.monotonic() + STACK_SECONDS
        has_answer = False
        while (mute := self._without_stack()) and time.monotonic() < deadline:
            if not has_answer and len(mute) < len(self._seen):
                has_answer = True
                deadline = min(deadline, time.monotonic() + OTHER_STACKS_SECONDS)
            time.sleep(STACK_POLL_SECONDS)
        time.sleep(STACK_POLL_SECONDS)  # the last stack may be half written
        return self._without_stack()

    def _without_stack(self) -> list[int]:
        return [rank for rank, earlier in enumerate(self._stack_sizes) if self._stack_size(rank) == earlier]

    def _stack_size(self, rank: int) -> int:
        # NFS asks its server when a file is opened. The size that `stat` returns may be some seconds old.
        with suppress(OSError), stack_of(self._folder, rank).open("rb") as file:
            return file.seek(0, os.SEEK_END)
        return 0
