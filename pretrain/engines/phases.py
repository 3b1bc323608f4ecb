"""What a rank's step went to: seconds by phase, and memory.

    count ─▶ forward, backward of each micro-batch ─▶ the last sums over ranks ─▶ clip and step ─▶ exchange of numbers
      │                        │                                │                      │
    communication       forward_backward                  communication            optimizer

On a CPU times are the host's. On CUDA they are marked on the stream, and read after the step's own synchronization.
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
    """Of one rank in one step; its times are disjoint parts of the step, in seconds."""

    nats: float
    """Of its micro-batches."""
    forward_backward: float
    """From the first forward pass until the last gradient is computed here. Communication that goes on meanwhile is no
    part of it where the rank does not wait (DDP's sums of gradients), and cannot be told from it on CUDA (FSDP's
    gathers), nor on a CPU in HSDP's sums over replicas."""
    optimizer: float
    """Clipping and the update; of a sharded model also the sum over ranks that the global norm takes."""
    communication: float
    """Waiting for other ranks, slower ones included: for the count of target bytes, after the last gradient until all
    sums over ranks are there, and on a CPU in FSDP's gathers and sums. The exchange that tells this is not in it."""
    peak_memory_bytes: float
    """As `peak_memory_bytes`."""

    def told_to_all(self, world: World) -> list[Self]:
        """These of each rank, by rank, on all of them."""
        return [type(self)(*numbers) for numbers in world.gather_numbers(*astuple(self))]


Mark = float | torch.cuda.Event


class Clock:
    """Marks moments of a device's work, and tells the seconds between them when that work is done."""

    def __init__(self, device: torch.device) -> None:
        self._on_stream = device.type == "cuda"

    def mark(self) -> Mark:
        if not self._on_stream:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Mark, end: Mark) -> float:
        if isinstance(begin, torch.cuda.Event):
            assert isinstance(end, torch.cuda.Event)
            end.synchronize()
            return begin.elapsed_time(end) / 1000
        assert isinstance(end, float)
        return end - begin


class PassTimes:
    """Of one step's passes: when the last gradient was computed, and what the rank waited for on the way.

    Sums of gradients over ranks end in callbacks of the autograd engine, which are called in the order in which they
    were queued once all gradients are computed. Ours is queued as backward begins, and so comes before them.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.begin = clock.mark()
        self.computed = self.begin
        self.waited = 0.0
        """In blocking collectives of the host, until the last gradient was computed; seconds."""
        self._waited = 0.0

    def watch(self, loss: Tensor) -> None:
        """Call before the backward pass of each loss."""
        loss.register_hook(lambda _: call_after_backward(self._all_computed))

    def wait(self, seconds: float) -> None:
        """Call after a collective in which the host was blocked."""
        self._waited += seconds

    def _all_computed(self) -> None:
        self.computed = self._clock.mark()
        self.waited = self._waited


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held: on a CUDA device, or else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024
