"""Time and memory of a rank's step: seconds by phase, and peak bytes.

    count ─▶ forward, backward of each micro-batch ─▶ the last sums over ranks ─▶ clip and step ─▶ exchange of numbers
      │                        │                                │                      │
    communication       forward_backward                  communication            optimizer

Times on a CPU are the host's. On CUDA they are marked on the stream, and read one step late.
"""

import resource
import sys
import time
from typing import NamedTuple

import torch
from torch import Tensor

from byteloom.core.torch_compat import call_after_backward


class RankStep(NamedTuple):
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
    """Time of waiting for other ranks, slower ones included: after the last gradient until all sums over ranks are
    done, and on a CPU in FSDP's gathers and sums; also for the count of target bytes, if the step before has not
    exchanged it. The exchange of these numbers is not included."""
    peak_memory_bytes: float
    """Peak memory of its process: allocated on a CUDA device, or else resident."""
    reserved_memory_bytes: float = 0
    """Device memory that torch's allocator holds; 0 on a CPU."""
    allocation_retries: float = 0
    """Times that the allocator had to free its cache to find memory, since the start; 0 on a CPU."""


class PhaseTimes(NamedTuple):
    """Times of `RankStep`."""

    forward_backward: float
    optimizer: float
    communication: float


class DeviceMemory(NamedTuple):
    """Memory of `RankStep`."""

    peak: float
    reserved: float
    retries: float


Mark = float | torch.cuda.Event


class Clock:
    """Clock of a device's work: marks moments, and measures the seconds between them when the work is done."""

    def __init__(self, device: torch.device) -> None:
        self.is_on_stream = device.type == "cuda"
        """Marks are moments of a stream. False: they are moments of the host."""

    def mark(self) -> Mark:
        """Return a mark of the current moment of the device's work."""
        if not self.is_on_stream:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Mark, end: Mark) -> float:
        """Return the seconds between two marks of work that is done."""
        if isinstance(begin, torch.cuda.Event):
            assert isinstance(end, torch.cuda.Event)
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


class StepMarks(NamedTuple):
    """Moments of a step."""

    counting: Mark
    """Begin of the sum of target bytes over ranks, if they are not known."""
    counted: Mark
    passes: PassTimes
    passed: Mark
    """End of all passes, sums of gradients over ranks included."""
    updated: Mark


class StepTimes:
    """Times of steps, which the host reads without waiting for the device.

    On CUDA, a step's marks are read once its numbers have arrived. Its update may still run then, so the optimizer's
    time is that of the step before. Both become known one step late.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._before: StepMarks | None = None
        self._known = PhaseTimes(0.0, 0.0, 0.0)

    def known(self, marks: StepMarks) -> PhaseTimes:
        """Return the times of a step, given its marks; on CUDA the newest that are known, 0 in the first step."""
        return self._known if self._clock.is_on_stream else self._times(marks, marks)

    def read(self, marks: StepMarks) -> None:
        """Read the marks of a step whose numbers have arrived."""
        if self._clock.is_on_stream:
            self._known = self._times(marks, self._before)
            self._before = marks

    def _times(self, marks: StepMarks, updated: StepMarks | None) -> PhaseTimes:
        seconds, passes = self._clock.seconds, marks.passes
        return PhaseTimes(
            forward_backward=seconds(passes.begin, passes.computed) - passes.waited,
            optimizer=0.0 if updated is None else seconds(updated.passed, updated.updated),
            communication=seconds(marks.counting, marks.counted)
            + passes.waited
            + seconds(passes.computed, marks.passed),
        )


def device_memory(device: torch.device) -> DeviceMemory:
    """Return the memory of this process: on a CUDA device, or else resident memory."""
    if device.type == "cuda":
        of_torch = torch.cuda.memory_stats(device)
        names = ("allocated_bytes.all.peak", "reserved_bytes.all.current", "num_alloc_retries")
        return DeviceMemory(*(of_torch.get(name, 0) for name in names))
    return DeviceMemory(peak_resident_bytes(), 0, 0)


def peak_resident_bytes() -> int:
    """Return the peak of this process's resident memory."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024
