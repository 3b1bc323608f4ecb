"""Times of a training step, and what follows from them."""

import math
import resource
import sys
import time

import torch

from pretrain.engines import StepResult


class Meter:
    """Call `start`, then `data_is_here` when the batch has come, then `numbers` when the step is done.

    Args:
        flops_a_step: of forward and backward over a global batch.
        peak: FLOP/s that the device could do.
    """

    def __init__(self, flops_a_step: float, peak: float, device: torch.device) -> None:
        self._flops_a_step, self._peak, self._device = flops_a_step, peak, device
        self._begin = self._data = 0.0
        self.seconds_a_step = 0.0
        """Moving average over about ten steps."""

    def start(self) -> None:
        self._begin = time.perf_counter()

    def data_is_here(self) -> None:
        self._data = time.perf_counter()

    def numbers(self, result: StepResult) -> dict[str, float]:
        """The step's metrics, by the names the journal and the tracker know them."""
        seconds = time.perf_counter() - self._begin
        self.seconds_a_step = 0.9 * self.seconds_a_step + 0.1 * seconds if self.seconds_a_step else seconds
        return {
            "train/bits_per_byte": result.nats / max(result.target_bytes, 1) / math.log(2),
            "gradient_norm": result.gradient_norm,
            "bytes_per_second": result.target_bytes / seconds,
            "step_seconds": seconds,
            "data_wait_share": (self._data - self._begin) / seconds,
            "mfu": self._flops_a_step / seconds / self._peak,
            "peak_memory_bytes": peak_memory_bytes(self._device),
        }


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held: on a CUDA device, or else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024
