"""Copies between the host's memory and the device, on a stream of their own. The host does not wait for them.

    micro-batch ─▶ one array ─▶ pinned memory ─▶ copy, while the device computes ─▶ views on the device
    numbers of the step, before the update ─▶ all ranks' numbers ─▶ copy, during the update ─▶ host

torch keeps pinned memory until the copies from it have ended, and uses it again. On a CPU nothing is copied.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 16
"""Divisor of the offset of each array among arrays that are copied together, in bytes."""

_DTYPES = {
    "uint8": torch.uint8,
    "bool": torch.bool,
    "int16": torch.int16,
    "int64": torch.int64,
    "float64": torch.float64,
}
"""Types of arrays that are sent, by NumPy's name."""


class Transfers:
    """Copies of one device.

    Args:
        device: CUDA or CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, *arrays: NDArray[Any]) -> "Sent":
        """Begin to copy arrays to the device, as one copy. On a CPU, the tensors share the arrays' memory."""
        if self._stream is None:
            return Sent([torch.from_numpy(array) for array in arrays])
        starts = np.cumsum([0, *(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays)])
        packed = np.zeros(starts[-1], np.uint8)
        for start, array in zip(starts, arrays, strict=False):
            packed[start : start + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
        with torch.cuda.stream(self._stream):
            there = torch.from_numpy(packed).pin_memory().to(self._device, non_blocking=True)
            arrived = self._stream.record_event()
        tensors = [
            there[start : start + array.nbytes].view(_DTYPES[array.dtype.name]).view(array.shape)
            for start, array in zip(starts.tolist(), arrays, strict=False)
        ]
        return Sent(tensors, arrived)

    def mark(self) -> torch.cuda.Event | None:
        """Return the current moment of the device's work; None on a CPU."""
        return None if self._stream is None else torch.cuda.current_stream(self._device).record_event()

    @contextmanager
    def on_own_stream(self, after: torch.cuda.Event | None = None, *tensors: Tensor) -> Iterator[None]:
        """Queue the device's work within on the stream of copies.

        Args:
            after: moment that it waits for; None does not wait. Later work of the current stream may run at
                the same time.
            tensors: what it reads.
        """
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            for tensor in tensors:
                tensor.record_stream(self._stream)
            yield

    def fetch(self, values: Tensor) -> "Fetched":
        """Begin to copy values to the host, after the work that is queued on the current stream."""
        if self._stream is None:
            return Fetched(values)
        host = values.to("cpu", non_blocking=True)
        return Fetched(host, torch.cuda.current_stream(self._device).record_event())


class Sent:
    """Tensors on the way to the device."""

    def __init__(self, tensors: list[Tensor], arrived: torch.cuda.Event | None = None) -> None:
        self._tensors, self._arrived = tensors, arrived

    def take(self) -> list[Tensor]:
        """Return the tensors, for use on the current stream, which waits for them. The host does not."""
        if self._arrived is not None:
            stream = torch.cuda.current_stream(self._tensors[0].device)
            stream.wait_event(self._arrived)
            for tensor in self._tensors:
                tensor.record_stream(stream)
        return self._tensors


class Fetched:
    """Values on the way to the host."""

    def __init__(self, values: Tensor, arrived: torch.cuda.Event | None = None) -> None:
        self._values, self._arrived = values, arrived

    def wait(self) -> Tensor:
        """Return the values, once they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values
