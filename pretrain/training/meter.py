"""Times of a training step, and the metrics that follow from them."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pretrain.engines import StepResult


class Meter:
    """Clock of a step: call `start`, then `wait_for_data` for each wait, then `numbers` after the step.

    Args:
        flops_a_step: FLOPs of forward and backward over a global batch.
        peak: FLOP/s of all devices of the run; None if unknown, and then there is no MFU.
        metric: name of the loss; see `ObjectiveConfig.metric`.
    """

    def __init__(self, flops_a_step: float, peak: float | None, metric: str = "bits_per_byte") -> None:
        self._flops_a_step, self._peak, self._metric = flops_a_step, peak, metric
        self._begin = 0.0
        self.data_seconds = 0.0
        """Seconds that this rank has waited for data since the step began: for its batch, or for the next one."""
        self.seconds_a_step = 0.0
        """Seconds of a step, a moving average over about ten steps."""
        self.compute_seconds_by_rank: list[float] = []
        """Seconds of forward and backward in the last step, by rank, without the wait for other ranks."""
        self.peak_memory_by_rank: list[float] = []
        """Bytes of the highest use of device memory, by rank."""

    def start(self) -> None:
        """Note that a step begins."""
        self._begin = time.perf_counter()
        self.data_seconds = 0.0

    @contextmanager
    def wait_for_data(self) -> Iterator[None]:
        """Count the time within as a wait for data."""
        begin = time.perf_counter()
        yield
        self.data_seconds += time.perf_counter() - begin

    def numbers(self, result: StepResult, data_seconds: Sequence[float], sources: Sequence[str]) -> dict[str, float]:
        """Return the step's metrics, by their names in the journal and the trackers.

        `bytes_per_second` and `mfu` count all ranks together. Of a metric that differs by rank, NAME is the largest
        value, and NAME/least the smallest where there are several ranks.

        Args:
            result: of the step.
            data_seconds: seconds that each rank waited for data.
            sources: names of the sources of the batch's rows, in the order of `result.by_source`.
        """
        seconds = time.perf_counter() - self._begin
        self.seconds_a_step = 0.9 * self.seconds_a_step + 0.1 * seconds if self.seconds_a_step else seconds
        ranks = result.ranks
        self.compute_seconds_by_rank = [rank.forward_backward for rank in ranks]
        self.peak_memory_by_rank = [rank.peak_memory_bytes for rank in ranks]
        numbers = {
            f"train/{self._metric}": result.nats / max(result.target_bytes, 1) / math.log(2),
            "gradient_norm": result.gradient_norm,
            "bytes_per_second": result.target_bytes / seconds,
            "step_seconds": seconds,
            "data_wait_share": max(data_seconds) / seconds,
            "forward_backward_seconds": max(self.compute_seconds_by_rank),
            "optimizer_seconds": max(rank.optimizer for rank in ranks),
            "peak_memory_bytes": max(self.peak_memory_by_rank),
        }
        if any(rank.reserved_memory_bytes for rank in ranks):  # on CUDA
            numbers["reserved_memory_bytes"] = max(rank.reserved_memory_bytes for rank in ranks)
            numbers["allocation_retries"] = max(rank.allocation_retries for rank in ranks)
        for name, (nats, target_bytes) in zip(sources, result.by_source, strict=bool(result.by_source)):
            if target_bytes:
                numbers[f"train/{name}/{self._metric}"] = nats / target_bytes / math.log(2)
        if self._peak is not None:
            # A measured peak can be too low; then the fastest step so far is the peak.
            self._peak = max(self._peak, self._flops_a_step / seconds)
            numbers["mfu"] = self._flops_a_step / seconds / self._peak
        if len(ranks) > 1:
            numbers |= {
                "bytes_per_second/per_rank": numbers["bytes_per_second"] / len(ranks),
                "communication_seconds": max(rank.communication for rank in ranks),
                "communication_seconds/least": min(rank.communication for rank in ranks),
                "forward_backward_seconds/least": min(self.compute_seconds_by_rank),
                "peak_memory_bytes/least": min(self.peak_memory_by_rank),
                "slowest_rank": max(range(len(ranks)), key=self.compute_seconds_by_rank.__getitem__),
            }
        return numbers
