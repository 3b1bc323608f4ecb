"""Slow ranks, found by the time that each rank computes.

A slow rank takes longer over its own forward and backward passes, and the other ranks wait for it. The times are
compared without the wait. Three rules keep a noisy machine from raising a false alarm:

- A rank is compared with the ranks that had as much work, step by step. What slows all of them cancels out.
- It must be slow in three quarters of the steps of a window. Pauses, compilations and saves last a few steps.
- It must lose some milliseconds a step, which is more than the noise of short steps.
"""

import logging
from collections.abc import Mapping, Sequence
from statistics import median, median_low, quantiles
from typing import NamedTuple

from data_pipeline.stream.dealing import deal
from launchers.supervision.plan import SuperviseConfig
from launchers.supervision.slow_ranks import SlowRank, describe_slow_ranks, write_slow_ranks
from pretrain.distributed.context import group_of
from pretrain.training.callbacks.base import Callback
from pretrain.training.run import TrainingRun

LEAST_SECONDS = 0.005
"""Time that a slow rank loses in a step, at least."""

log = logging.getLogger(__name__)


class StragglersCallback(Callback):
    """Looks for slow ranks after each window of steps. Logs them, and keeps slow-ranks.json in the run folder."""

    def __init__(self, config: SuperviseConfig) -> None:
        self._config = config
        self._nodes: list[str] = []
        """Node of each rank."""
        self._watch: StragglerWatch | None = None
        """Only the first rank has one, and only where there are others."""
        self._found: Window | None = None
        """The window that ended with the last step."""
        self._reported: dict[str, str] = {}
        """Clauses about the slow ranks of the last window, by node."""

    def on_start(self, run: TrainingRun) -> None:
        """Learn the nodes of the ranks, and forget the slow ranks of an earlier start."""
        self._nodes = run.world.gather(run.heartbeat.node)
        if not run.world.is_first:
            return
        write_slow_ranks(run.folder.path, run.step, [])
        if run.world.size > 1:
            train = run.recipe.train
            self._watch = StragglerWatch(
                equal_work(train.global_batch, train.micro_batch, run.world.size, run.recipe.engine.context),
                self._config.slow_factor,
                self._config.slow_steps,
            )

    def after_step(self, run: TrainingRun, numbers: Mapping[str, float]) -> None:
        """Add the times of the step, and report what the window shows if it ends here."""
        self._found = None if self._watch is None else self._watch.add(run.meter.compute_seconds_by_rank)
        if self._found is not None and run.fence.holds:
            factors = self._found.factors
            self._report(run, [SlowRank(rank, self._nodes[rank], factors[rank]) for rank in self._found.slow])

    def measure(self, run: TrainingRun) -> Mapping[str, float]:
        """Return the slowest rank of the window that ends with this step, and the number of slow ranks."""
        if self._found is None or not self._found.factors:
            return {}
        rank, factor = max(self._found.factors.items(), key=lambda item: item[1])
        return {"rank": rank, "factor": factor, "slow_ranks": len(self._found.slow)}

    def _report(self, run: TrainingRun, slow: Sequence[SlowRank]) -> None:
        clauses = describe_slow_ranks(slow)
        for node, clause in clauses.items():
            if node not in self._reported:
                log.warning("%s (its compute time, in the last %d steps)", clause, self._config.slow_steps)
        for node in self._reported.keys() - clauses.keys():
            log.info("the ranks of %s are not slow any more", node)
        if slow or self._reported:
            write_slow_ranks(run.folder.path, run.step, slow)
        self._reported = clauses


class Window(NamedTuple):
    """Compute times of a window of steps."""

    factors: dict[int, float]
    """Time of each rank relative to the median of the ranks with as much work; the median over the steps. A rank that
    no other one equals is left out."""
    slow: list[int]
    """Ranks that are slow."""


class StragglerWatch:
    """Collects the compute times of windows of steps.

    Args:
        groups: ranks with equal work.
        slow_factor: time relative to the median at which a rank is slow.
        steps: length of a window.
    """

    def __init__(self, groups: Sequence[Sequence[int]], slow_factor: float, steps: int) -> None:
        self._groups, self._slow_factor, self._steps = groups, slow_factor, steps
        self._times: list[Sequence[float]] = []

    def add(self, seconds: Sequence[float]) -> Window | None:
        """Add the times of a step by rank; return what the window shows if it ends with this step."""
        self._times.append(list(seconds))
        if len(self._times) < self._steps:
            return None
        times, self._times = self._times, []
        factors, slow = dict[int, float](), list[int]()
        for group in self._groups:
            # The lower one of two middle values: of two ranks, or two nodes, the faster one is the measure.
            usual = [median_low(step[rank] for rank in group) for step in times]
            for rank in group:
                ratios = [step[rank] / max(least, 1e-9) for step, least in zip(times, usual, strict=True)]
                lost = median(step[rank] - least for step, least in zip(times, usual, strict=True))
                factors[rank] = median(ratios)
                if quantiles(ratios, n=4)[0] >= self._slow_factor and lost >= LEAST_SECONDS:
                    slow.append(rank)
        return Window(factors, sorted(slow))


def equal_work(global_batch: int, micro_batch: int, size: int, context: int = 1) -> list[list[int]]:
    """Return the groups of ranks that have equal parts of equally long micro-batches, without groups of one rank."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(size):
        micro_batches = deal(global_batch, micro_batch, *group_of(rank, size, context))
        lengths = tuple(len(rows) for rows in micro_batches.values())
        groups.setdefault((rank % context, *lengths), []).append(rank)
    return [ranks for ranks in groups.values() if len(ranks) > 1]
