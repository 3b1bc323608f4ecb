"""Time and memory of a rank's step: seconds by phase, and peak bytes.

    count ─▶ forward, backward of each micro-batch ─▶ the last sums over ranks ─▶ clip and step ─▶ exchange of numbers
      │                        │                                │                      │
    communication       forward_backward                  communication            optimizer

Times on a CPU are the host's. On CUDA they are marked on the stream, and read after the step's own synchronization.
"""

import resource
import sys
import time
from dataclasses import astuple, dataclass
from typing import Self

import torch
from torch import Tensor

from byteloom.core.torch_compat import call_after_backward
from pretrain.distributed.world import World


@dataclass(frozen=True)
class RankStep:
    """Numbers of one rank in one step. Times are disjoint parts of the step, in seconds."""

    nats: float
    """Negative log-likelihood of its micro-batches."""
    forward_backward: float
    """Time from the first forward pass until this rank has computed its last gradient. Communication in the background
    (DDP's sums of gradients) is not counted. FSDP's gathers on CUDA and HSDP's sums over replicas on a CPU cannot be
    separated, and are included."""
    optimizer: float
    """Time of clipping and of the update. A sharded model includes the sum over ranks that the global norm needs."""
    communication: float
    """Time of waiting for other ranks, slower ones included: for the count of target bytes, after the last gradient
    until all sums over ranks are done, and on a CPU in FSDP's gathers and sums. The exchange of these numbers is not
    included."""
    peak_memory_bytes: float
    """Result of the function `peak_memory_bytes`."""

    def gathered(self, world: World) -> list[Self]:
        """Return the numbers of all ranks, by rank."""
        return [type(self)(*numbers) for numbers in world.gather_numbers(*astuple(self))]


Mark = float | torch.cuda.Event


class Clock:
    """Clock of a device's work: marks moments, and measures the seconds between them when the work is done."""

    def __init__(self, device: torch.device) -> None:
        self._on_stream = device.type == "cuda"

    def mark(self) -> Mark:
        """Return a mark of the current moment of the device's work."""
        if not self._on_stream:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Mark, end: Mark) -> float:
        """Return the seconds between two marks; wait for the second one."""
        if isinstance(begin, torch.cuda.Event):
            assert isinstance(end, torch.cuda.Event)
            end.synchronize()
            return begin.elapsed_time(end) / 1000
        assert isinstance(end, float)
        return end - begin


class PassTimes:
    """Times of one step's passes: of the last gradient, and of waiting until then.

    Sums of gradients over ranks end in callbacks of the autograd engine. It calls them in the order in which they were
    queued, once all gradients are computed. Ours is queued when backward begins, and therefore precedes them.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.begin = clock.mark()
        self.computed = self.begin
        self.waited = 0.0
        """Seconds in blocking collectives of the host until the last gradient was computed."""
        self._waited = 0.0

    def watch(self, loss: Tensor) -> None:
        """Note when the last gradient of a loss is computed. Call it before the backward pass of the loss."""
        loss.register_hook(lambda _: call_after_backward(self._all_computed))

    def wait(self, seconds: float) -> None:
        """Add the seconds of a collective that blocked the host."""
        self._waited += seconds

    def _all_computed(self) -> None:
        self.computed = self._clock.mark()
        self.waited = self._waited


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak of this process's memory: on a CUDA device, or else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024
