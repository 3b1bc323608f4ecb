"""Check of one node before a start: `python -m launchers.checks.node REQUEST`, on all nodes of a job at once.

It prints a line, which is a NodeReport. Without GPUs it takes the time of an interpreter's start: only devices.py
imports torch, in a process of its own, which may hang or crash.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from launchers.checks.report import DEVICE_CHECKS, CheckRequest, NodeFault, NodeReport

LINES_SECONDS = 120.0
"""Time that the shell lines of a preset may take."""
DEVICES_SECONDS = 240.0
"""Time that the checks of the GPUs may take, with the import of torch."""
DRIVER_SECONDS = 30.0
"""Time that the driver may take to answer."""
LEAST_MEMORY = 256 << 20
"""Free memory that each rank needs, in bytes."""
LEAST_SHARED_MEMORY = 16 << 20
"""Free space that each rank needs in /dev/shm, in bytes."""
FREE_SHARE = 0.8
"""Share of the memory that the job asks for which must be free. The system's own processes have the rest."""
LONGEST_WORDS = 300
"""Characters of a fault that are kept."""
ECC = "ecc.errors.uncorrected.volatile.total"
SLOWDOWNS = ("hw_thermal_slowdown", "hw_power_brake_slowdown")
NAME_THE_FAILED = "set -E; trap 'c=$?; echo \"$BASH_COMMAND: exit code $c\" >&2' ERR\n"
"""Line of bash that prints the command which ends a script of `bash -e`."""


def examine_node(request: CheckRequest, node: str, shared_memory: Path = Path("/dev/shm")) -> NodeReport:
    """Return what is wrong with this node.

    Args:
        request: what is checked.
        node: Slurm's name of this node.
        shared_memory: mount of the shared memory.
    """
    asked = time.time()
    found: list[NodeFault] = []
    checks = {
        "writable": lambda: _of_folder(Path(request.folder), node),
        "memory": lambda: _of_memory(request),
        "shm": lambda: _of_shared_memory(request, shared_memory),
    }
    for name, check in checks.items():
        if request.includes(name):
            try:
                found += [NodeFault(name, words) for words in check()]
            except OSError as error:
                found.append(NodeFault(name, str(error), error.errno or 0))
    if request.gpus:
        found += [*_of_driver(request), *_of_devices(request)]
    if request.lines:
        found += _of_lines(request.lines)
    return NodeReport(node, asked, [NodeFault(each.check, each.words[:LONGEST_WORDS], each.number) for each in found])


def _of_folder(folder: Path, node: str) -> Iterator[str]:
    """Write a file to the run folder and read it again."""
    path = folder / "ranks" / f".check-{node}"
    with path.open("wb") as file:
        file.write(node.encode())
        file.flush()
        os.fsync(file.fileno())
    read = path.read_bytes()
    path.unlink()
    if read != node.encode():
        yield f"{folder} does not return what was written to it"


def _of_memory(request: CheckRequest) -> Iterator[str]:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    sizes = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)}
    free, needed = sizes["MemAvailable"], max(request.memory * FREE_SHARE, request.ranks * LEAST_MEMORY)
    if free < needed:
        yield f"{free >> 20} MiB of memory are free, and the job needs {int(needed) >> 20} MiB"


def _of_shared_memory(request: CheckRequest, mount: Path) -> Iterator[str]:
    space = os.statvfs(mount)
    free, needed = space.f_bavail * space.f_frsize, request.ranks * LEAST_SHARED_MEMORY
    if free < needed:
        yield f"{free >> 20} MiB are free in {mount}, and the job needs {needed >> 20} MiB"


def _of_driver(request: CheckRequest) -> Iterator[NodeFault]:
    """Yield uncorrected errors of the GPUs' memory, and GPUs that are slowed down by heat or by lack of power.

    Nothing is known where there is no nvidia-smi, or where it does not know a field.
    """
    if shutil.which("nvidia-smi") is None:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    which = [f"--id={visible}"] if visible else []
    fields = {"ecc": [ECC], "throttle": [f"clocks_throttle_reasons.{reason}" for reason in SLOWDOWNS]}
    for name, asked in fields.items():
        if not request.includes(name):
            continue
        query = f"--query-gpu=index,{','.join(asked)}"
        code, printed = _run(["nvidia-smi", *which, query, "--format=csv,noheader,nounits"], DRIVER_SECONDS)
        if "not a valid field" in printed:
            continue
        if code:
            yield NodeFault(name, f"nvidia-smi: {_last_line(printed) or f'exit code {code}'}")
            return
        for line in printed.splitlines():
            gpu, *values = (value.strip() for value in line.split(","))
            if name == "ecc" and values[0].isdecimal() and int(values[0]):
                yield NodeFault(name, f"GPU {gpu} has {values[0]} uncorrected errors of its memory")
            elif name == "throttle" and "Active" in values:
                yield NodeFault(name, f"GPU {gpu} is slowed down ({SLOWDOWNS[values.index('Active')]})")


def _of_devices(request: CheckRequest) -> Iterator[NodeFault]:
    if not (wanted := [name for name in DEVICE_CHECKS if request.includes(name)]):
        return
    module = [sys.executable, "-P", "-m", "launchers.checks.devices"]
    code, printed = _run([*module, str(request.gpus), *wanted], DEVICES_SECONDS)
    if code:
        yield NodeFault(wanted[0], _last_line(printed) or f"exit code {code}")
        return
    answer = next(line for line in reversed(printed.splitlines()) if line.startswith("["))  # warnings surround it
    yield from (NodeFault(**tree) for tree in json.loads(answer))


def _of_lines(lines: Sequence[str]) -> Iterator[NodeFault]:
    code, printed = _run(["bash", "-e", "-c", NAME_THE_FAILED + "\n".join(lines)], LINES_SECONDS)
    if code:
        yield NodeFault("lines", _last_line(printed) or f"exit code {code}")


def _run(command: Sequence[str], seconds: float) -> tuple[int, str]:
    """Return the exit code and the output of a command. After its time, it and what it started are killed."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return 1, f"{command[0]} cannot be started: {error}"
    try:
        printed = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return 1, f"{process.communicate()[0]}\nno end after {seconds:.0f} s"
    return process.returncode, printed


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def longest_seconds(request: CheckRequest) -> float:
    """Return the time that the commands of a check may take."""
    return (LINES_SECONDS if request.lines else 0.0) + (DEVICES_SECONDS + 2 * DRIVER_SECONDS if request.gpus else 0.0)


if __name__ == "__main__":
    report = examine_node(CheckRequest(**json.loads(sys.argv[1])), os.environ["SLURMD_NODENAME"])
    print(report.line(), flush=True)
