"""A CUDA device without a GPU: shapes, types and devices are computed, values are not.

    shim.cpp ──▶ C++ accepts tensors on "cuda"        FakeTensorMode ──▶ operations compute no values
    stubs below ──▶ events and streams of torch.cuda  Watch ──▶ notes each operation that would wait for the device

`install` changes the whole process, so tests use it in a process of their own. loading.py loads the shim before.
"""

import collections
import contextlib
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed import device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ATEN = torch.ops.aten
SIZED_BY_VALUES = (ATEN.nonzero.default, ATEN.masked_select.default, ATEN.equal.default)
"""Operations whose results the host waits for."""
COPY_NUMBERS = (ATEN.where.self, ATEN.index_put_.default, ATEN.index_put.default)
"""Operations that copy a number of the host to the device, and wait; kernels of others take it as an argument."""
PACKAGES = {"pretrain", "data_pipeline"}
"""Packages whose lines are named in findings."""


def install() -> None:
    """Replace the functions of torch.cuda that need a driver."""
    make_mesh = device_mesh.init_device_mesh

    def init_device_mesh(*arguments: Any, **options: Any) -> device_mesh.DeviceMesh:
        with unset_fake_temporarily():  # ranks are values
            return make_mesh(*arguments, **options)

    device_mesh.init_device_mesh = init_device_mesh
    torch.cuda.Event = torch.Event = Event  # type: ignore[misc, assignment]
    torch.cuda.Stream = Stream  # type: ignore[misc, assignment]
    torch.Tensor.record_stream = lambda tensor, stream: None  # type: ignore[method-assign]
    torch.Tensor.pin_memory = lambda tensor: tensor  # type: ignore[method-assign] # FakeTensorMode does not know it
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 8
    torch.cuda.current_device = lambda: 0
    torch.cuda.set_device = lambda device: None
    torch.cuda.current_stream = torch.cuda.default_stream = lambda device=None: Stream()  # type: ignore[assignment]
    torch.cuda.stream = contextlib.nullcontext  # type: ignore[assignment, misc]
    torch.cuda.synchronize = lambda device=None: note("torch.cuda.synchronize")
    torch.cuda.manual_seed_all = lambda seed: None
    torch.cuda.max_memory_allocated = lambda device=None: 1
    torch.cuda.memory_stats = lambda device=None: {}
    torch.cuda.get_device_name = lambda device=None: "NVIDIA H200"
    torch.cuda.get_device_capability = lambda device=None: (9, 0)


class Event:
    """Event of a stream. Waiting for it is noted."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._time = time.perf_counter()

    def record(self, *_: Any) -> None:
        self._time = time.perf_counter()

    def synchronize(self) -> None:
        note("Event.synchronize")

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end._time - self._time)

    def wait(self, *_: Any) -> None:
        pass

    def query(self) -> bool:
        return True


class Stream:
    """Stream of the device. Waiting for it is noted."""

    device_index, device_type, stream_id = 0, 1, 0

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device("cuda", 0)

    def wait_stream(self, _: "Stream") -> None:
        pass

    def wait_event(self, _: Event) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def synchronize(self) -> None:
        note("Stream.synchronize")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0


course: list[str] = []
"""Waits of the host for the device, and updates of parameters, in their order."""
host_operations: collections.Counter[str] = collections.Counter()
"""Operations on tensors of the host, by the function of ours that calls them."""
device_operations: collections.Counter[str] = collections.Counter()
"""Operations on tensors of the device."""


def note(wait: str) -> None:
    """Note a wait."""
    course.append(f"{wait} in {_place()}")


def _place() -> str:
    """Return "draws" within a model's draw, else the innermost function of ours that is running, as FILE:FUNCTION."""
    frames = [(Path(frame.filename), frame.name) for frame in traceback.extract_stack()]
    ours = [
        (path.stem, name) for path, name in frames if "tests" not in path.parts and not PACKAGES.isdisjoint(path.parts)
    ]
    if any(name.startswith("draw_") for _, name in ours):
        return "draws"
    return ":".join(ours[-1]) if ours else "torch"


@contextlib.contextmanager
def watched(mode: FakeTensorMode) -> Iterator[None]:
    """Note what operations within do, in a mode that is on. Clear earlier notes."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if operation is torch.ops.prim.device.default:
                return operation(*args, **kwargs)
            devices = {each.device.type for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
            if operation in (ATEN._local_scalar_dense.default, ATEN.is_nonzero.default):
                if "cuda" in devices:
                    note("read of a value")
                return 1.0 if args[0].dtype.is_floating_point else True
            if "cuda" in devices and operation in SIZED_BY_VALUES:
                note(str(operation))
            if operation in COPY_NUMBERS and devices == {"cpu", "cuda"}:
                note(str(operation))
            if operation is ATEN._to_copy.default and not isinstance(args[0], FakeTensor):
                args = (mode.from_tensor(args[0]), *args[1:])  # drawn on the host, with values
            _count(operation, devices, args, kwargs)
            return operation(*args, **kwargs)

    for notes in (course, host_operations, device_operations):
        notes.clear()
    with Watch():
        yield


def _count(operation: Any, devices: set[str], args: Any, kwargs: Any) -> None:
    """Note an operation by the devices of its tensors, and a copy between devices if the host waits for it."""
    target, non_blocking = None, kwargs.get("non_blocking", False)
    if operation is ATEN._to_copy.default and kwargs.get("device") is not None:
        target = torch.device(kwargs["device"]).type
    elif operation is ATEN.copy_.default:
        target, devices = args[0].device.type, {args[1].device.type}
        non_blocking = non_blocking or (len(args) > 2 and args[2])
    if target is not None and {target} != devices:
        if not non_blocking:
            note(f"blocking copy to {target}")
    elif "cuda" in devices:
        device_operations[str(operation)] += 1
        if "_fused_adam" in str(operation):
            course.append("update")
    elif devices:
        host_operations[_place()] += 1
