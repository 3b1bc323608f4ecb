"""Cost of a checkpoint: stall of the training loop, speed of writing and reading, and time of planning.

python benchmarks/checkpoint.py [--quick] [--json PATH]

One process saves and loads the masters and moments of a model with 85 million parameters (1 GiB; `--quick`: 0.2 GiB) on
the disk of the working directory. The methods alternate. A share is the median of the shares of all rounds. Before each
measurement, earlier writes are flushed to disk. After it, what it wrote is deleted.

    bare              torch.save of the same tensors to a file, without fsync
    plain copy        copy of one file of the same bytes, then fsync
    write             `save` of a checkpoint
    sync, async       time that the loop waits. sync: `save`, which deletes the last checkpoint. async: `begin`, then
                      the passes of a step on one row of 1,024 bytes (not counted), then the rest of the copy
    finite checks     check for NaN and infinity: time of a copy of all values with the check, minus one without it
    copy              the whole copy, for which a loop without passes would wait
    load              compare every digest and copy to live tensors; files are in the page cache, as for the copy
    DCP               torch.distributed.checkpoint with fsync, without digests

Planning is measured for a model with 7 billion parameters (296 tensors, three times) on simulated ranks. Each rank owns
the rows of each tensor that FSDP2 would give it. Times are of the processor. The measurements are the first rank's plan
at the first save, its plan at the next save, and the plan of one rank for a load with another number of ranks. Then the
first rank saves its part for real, and the bytes that it sends to each other rank are counted.
"""

import hashlib
import json
import os
import pickle
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from common.report import Metric, options, report
from pretrain.checkpoint import CheckpointStore, Metadata
from pretrain.checkpoint.data import digests_of, share_of, windows_of
from pretrain.checkpoint.format import (
    BLOCK_BYTES,
    StoredFile,
    decode_layout,
    encode_layout,
    encode_metadata,
    owned_ranges,
    plan_reads,
)
from pretrain.checkpoint.homes.folder import FolderHome
from pretrain.checkpoint.staging import host_buffer
from pretrain.checkpoint.values import copy, copy_and_look
from pretrain.distributed.fragments import Fragment, whole
from pretrain.distributed.world import World
from pretrain.models import ByteModel, build_model, model_config

KINDS = ("model", "exp_avg", "exp_avg_sq")
ROUNDS, QUICK_ROUNDS = 5, 3
RANKS, DCP_RANKS = (8, 64, 256, 1024), (8, 64, 256)
STALL_GOAL, WRITE_GOAL, LOAD_GOAL, PLAN_GOAL, MESSAGES_GOAL, FINITE_GOAL = 0.10, 0.8, 0.7, 1.0, 1.0, 0.02
STAGING_COPIES = 3


def main() -> None:
    chosen = options(__doc__)
    metrics = io_metrics(chosen.quick) + planning_metrics(chosen.quick)
    report("Checkpoints", metrics, chosen.json)


def model_of(width: int, layers: int) -> ByteModel:
    """Return a Transformer on the meta device."""
    config = {"family": "transformer", "sequence_length": 1024, "width": width, "layers": layers, "heads": width // 64}
    with torch.device("meta"):
        return build_model(model_config(config))


def io_metrics(quick: bool) -> list[Metric]:
    model = (model_of(512, 6) if quick else model_of(768, 12)).to_empty(device="cpu")
    with tempfile.TemporaryDirectory(dir=".", prefix="checkpoint-benchmark-") as folder:
        bench = Bench(Path(folder), model)
        seconds = bench.rounds(QUICK_ROUNDS if quick else ROUNDS)
    size = 4 * sum(tensor.numel() for tensor in bench.tensors.values())
    speed = {name: size / 2**20 / statistics.median(times) for name, times in seconds.items()}

    def share(name: str, of: str, title: str, goal: float | None = None, better: str = "lower") -> Metric:
        """Return the ratio of the times of two methods, or of their speeds if higher is better."""
        pairs = [(seconds[name], seconds[of]), (seconds[of], seconds[name])][better == "higher"]
        ratio = statistics.median(own / other for own, other in zip(*pairs, strict=True))
        detail = f"{speed[name]:,.0f} MiB/s; {of}: {speed[of]:,.0f} MiB/s"
        return Metric(title, ratio, f"of {of}", detail, goal, better)

    return [
        share("sync", "bare", "sync: stall of the loop"),
        share("async", "bare", "async: stall of the loop"),
        share("async", "sync", "async: stall of the loop", STALL_GOAL),
        share("copy", "sync", "async: stall of a loop without passes"),
        share("write", "plain copy", "write", WRITE_GOAL, "higher"),
        finite_checks(seconds),
        share("load", "plain copy", "load, verified", LOAD_GOAL, "higher"),
        share("load", "plain read", "load, verified", None, "higher"),
        share("DCP save", "plain copy", "DCP: write", None, "higher"),
        share("DCP load", "plain copy", "DCP: load", None, "higher"),
        Metric(
            "a loop during an async save",
            statistics.median(seconds["during a save"]) / statistics.median(seconds["alone"]),
            "of its time alone",
            f"matrix products on {torch.get_num_threads()} threads",
            None,
            "lower",
        ),
        *digest_metrics(),
    ]


def finite_checks(seconds: dict[str, list[float]]) -> Metric:
    """Return the cost of the check for non-finite values, as a share of a save in the same round."""
    rounds = zip(seconds["staging"], seconds["staging, looked at"], seconds["write"], strict=True)
    parts = [(looked - plain) / write for plain, looked, write in rounds]
    plain, looked = (statistics.median(seconds[name]) for name in ("staging", "staging, looked at"))
    detail = f"copy of all values: {looked:.3f} s, without a look {plain:.3f} s"
    return Metric("finite checks", statistics.median(parts), "of a save", detail, FINITE_GOAL, "lower")


class Bench:
    """Methods that write and read the masters and moments of a model."""

    def __init__(self, folder: Path, model: ByteModel) -> None:
        self.folder = folder
        self.model = model
        self.tensors = tensors = {
            f"{kind}/{name}": parameter.data.normal_(std=0.02) if kind == "model" else torch.randn(parameter.shape)
            for kind in KINDS
            for name, parameter in model.named_parameters()
        }
        self.fragments = fragments = [whole(name, tensor) for name, tensor in tensors.items()]
        self.staged = host_buffer(sum(len(fragment.data) for fragment in fragments))
        self.store = CheckpointStore(folder / "home", keep=1)
        self.all = CheckpointStore(folder / "all", keep=None)
        self.step = 0
        self.matrix = torch.randn(512, 512)
        self.source = folder / "source"
        self.source.write_bytes(b"".join(tensor.numpy().tobytes() for tensor in tensors.values()))
        self.kept = CheckpointStore(folder / "kept", keep=None)
        self.kept.save(1, fragments, {})
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder / "dcp-kept"), no_dist=True)

    def rounds(self, count: int) -> dict[str, list[float]]:
        """Return the seconds by method. The first round, which allocates buffers, does not count."""
        methods: dict[str, Callable[[], float]] = {
            "bare": lambda: self.timed(lambda: torch.save(self.tensors, self.folder / "bare")),
            "plain copy": lambda: self.timed(self.plain_copy),
            "write": lambda: self.timed(lambda: self.all.save(1, self.fragments, {})),
            "staging": lambda: self.staging(copy),
            "staging, looked at": lambda: self.staging(copy_and_look),
            "sync": lambda: self.timed(self.save),
            "async": self.stall,
            "copy": self.copy,
            "plain read": lambda: self.timed(self.plain_read),
            "load": lambda: self.timed(lambda: self.kept.load(lambda metadata: self.fragments)),
            "DCP save": lambda: self.timed(self.dcp_save),
            "DCP load": lambda: self.timed(self.dcp_load),
            "alone": lambda: self.products(20),
            "during a save": self.products_during_save,
        }
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(1 + count):
            for name, method in methods.items():
                os.sync()
                seconds[name].append(method())
                for name_of_output in ("bare", "copy", "all", "dcp"):
                    path = self.folder / name_of_output
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return {name: times[1:] for name, times in seconds.items()}

    @staticmethod
    def timed(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def plain_copy(self) -> None:
        shutil.copyfile(self.source, self.folder / "copy")
        descriptor = os.open(self.folder / "copy", os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    def plain_read(self) -> None:
        with self.source.open("rb", buffering=0) as file:
            buffer = bytearray(BLOCK_BYTES)
            while file.readinto(buffer):
                pass

    def save(self) -> None:
        self.begin()
        self.store.finish()

    def begin(self) -> None:
        self.step += 1
        self.store.begin(self.step, self.fragments, {})

    def stall(self) -> float:
        seconds = self.timed(self.begin)
        self.passes()
        seconds += self.timed(self.store.wait_for_copy)
        self.store.finish()
        return seconds

    def passes(self) -> None:
        self.model.zero_grad()
        self.model(torch.randint(256, (1, self.model.sequence_length))).mean().backward()

    def staging(self, method: Callable[[Sequence[Tensor], Sequence[Tensor]], object]) -> float:
        """Return the minimum seconds of several copies of all values to a buffer in host memory."""
        sources = [fragment.data for fragment in self.fragments]
        targets = self.staged.split([len(source) for source in sources])
        return min(self.timed(lambda: method(targets, sources)) for _ in range(STAGING_COPIES))

    def copy(self) -> float:
        seconds = self.timed(self.begin) + self.timed(self.store.wait_for_copy)
        self.store.finish()
        return seconds

    def dcp_save(self) -> None:
        writer = dcp.FileSystemWriter(self.folder / "dcp", sync_files=True)
        dcp.save(self.tensors, storage_writer=writer, no_dist=True)

    def dcp_load(self) -> None:
        dcp.load(self.tensors, storage_reader=dcp.FileSystemReader(self.folder / "dcp-kept"), no_dist=True)

    def products(self, count: int) -> float:
        """Return the mean seconds of one matrix product."""
        return self.timed(lambda: [self.matrix @ self.matrix for _ in range(count)]) / count

    def products_during_save(self) -> float:
        self.begin()
        writing = threading.Thread(target=self.store.finish)
        writing.start()
        times = []
        while writing.is_alive():
            times.append(self.products(5))
        return statistics.mean(times)


def digest_metrics() -> list[Metric]:
    content = memoryview(np.random.default_rng(0).bytes(64 * BLOCK_BYTES))

    def sha256() -> None:
        for begin in range(0, len(content), BLOCK_BYTES):
            hashlib.sha256(content[begin : begin + BLOCK_BYTES]).digest()

    seconds: dict[str, list[float]] = {"BLAKE3": [], "sha256": []}
    for _ in range(5):
        seconds["BLAKE3"].append(Bench.timed(lambda: digests_of(content)))
        seconds["sha256"].append(Bench.timed(sha256))
    blake3_speed, sha256_speed = (64 / statistics.median(times) for times in seconds.values())
    return [Metric("BLAKE3 of blocks", blake3_speed / sha256_speed, "of sha256's speed",
                   f"{blake3_speed:,.0f} and {sha256_speed:,.0f} MiB/s on one core")]  # fmt: skip


def planning_metrics(quick: bool) -> list[Metric]:
    parameters = dict(model_of(4096, 32).named_parameters())
    shapes = {f"{kind}/{name}": parameter.shape for kind in KINDS for name, parameter in parameters.items()}
    metrics = []
    for ranks in RANKS:
        fragments = [fragments_of(shapes, rank, ranks) for rank in range(ranks)]
        metrics += plan_with(ranks, shapes, fragments)
    metrics.append(save_by_first(fragments))
    for ranks in DCP_RANKS[: 1 if quick else None]:
        metrics.append(plan_with_dcp(ranks, shapes))
    return metrics


def rows_of(shape: torch.Size, rank: int, ranks: int) -> tuple[int, int]:
    """Return the first row and the number of rows of one rank, as torch.chunk divides them."""
    rows = -(-shape[0] // ranks)
    first = min(shape[0], rank * rows)
    return first, min(shape[0], first + rows) - first


def fragments_of(shapes: dict[str, torch.Size], rank: int, ranks: int) -> list[Fragment]:
    fragments = []
    for name, shape in shapes.items():
        first, rows = rows_of(shape, rank, ranks)
        row = shape.numel() // shape[0]
        fragments.append(Fragment(name, tuple(shape), first * row, torch.empty(rows * row, device="meta")))
    return fragments


def plan_with(ranks: int, shapes: dict[str, torch.Size], fragments: Sequence[Sequence[Fragment]]) -> list[Metric]:
    messages = [owned_ranges(of_rank) for of_rank in fragments]
    begin = time.process_time()
    layout = encode_layout(messages)
    once = time.process_time() - begin
    begin = time.process_time()
    assert owned_ranges(fragments[0]) == messages[0]
    next_save = time.process_time() - begin
    files = []
    for rank, of_rank in enumerate(fragments):
        size = 4 * sum(len(fragment.data) for fragment in of_rank)
        files.append(StoredFile(f"rank-{rank:05d}.bin", size, ("0" * 64,) * -(-size // BLOCK_BYTES)))
    marker = encode_metadata(files, StoredFile("layout.json", len(layout), ("0" * 64,)), {})
    loading_ranks = max(1, ranks * 3 // 4)
    requested = fragments_of(shapes, loading_ranks // 2, loading_ranks)
    begin = time.process_time()
    metadata = Metadata(FolderHome(Path()), "step", "", tuple(files), decode_layout(layout), {})
    needs = plan_reads(metadata, requested)
    windows = windows_of(share_of(metadata, loading_ranks // 2, loading_ranks))
    load = time.process_time() - begin
    read = sum((window.end - window.begin) * BLOCK_BYTES for window in windows)
    needed = 4 * sum(len(fragment.data) for fragment in requested)
    is_largest = ranks == max(RANKS)
    size = f"{(len(layout) + len(marker)) / 2**20:.3g} MiB of metadata, {sum(map(len, messages)) / 2**20:.3g} received"
    return [
        Metric(f"{ranks} ranks: planning the first save", once, "s", size, PLAN_GOAL if is_largest else None, "lower"),
        Metric(f"{ranks} ranks: planning the next save", next_save, "s", "", None, "lower"),
        Metric(f"{ranks} ranks: planning a load by one of {loading_ranks}", load, "s",
               f"{len(needs):,} ranges in {len(windows):,} reads of {read / needed:.2f} of the bytes it needs",
               None, "lower"),
    ]  # fmt: skip


class CountingWorld(World):
    """First rank of a simulated world, which counts what it sends to each other rank.

    Args:
        owned: what each rank owns.
    """

    def __init__(self, owned: Sequence[bytes]) -> None:
        super().__init__(0, len(owned))
        self.owned = owned
        self.sent_bytes = 0

    def with_own_group(self) -> World:
        return self

    def gather_on_first(self, content: bytes) -> list[bytes]:
        """Return what ranks own, or as many answers of ranks that have written a file like the first one's."""
        return list(self.owned) if content == self.owned[0] else [content] * self.size

    def gather(self, value: Any) -> list[Any]:
        self.sent_bytes += self.size * len(json.dumps(value))
        return [value] * self.size

    def sum(self, *numbers: float) -> list[float]:
        self.sent_bytes += 8 * len(numbers)
        return [self.size * number for number in numbers]

    def _from_first(self, value: Any) -> Any:
        self.sent_bytes += 8 + len(json.dumps(value))
        return value


def save_by_first(fragments: Sequence[Sequence[Fragment]]) -> Metric:
    """Count what the first of many ranks sends to each other rank during its first save, the only one with a plan."""
    world = CountingWorld([owned_ranges(of_rank) for of_rank in fragments])
    own = [Fragment(each.name, each.shape, each.start, torch.zeros(len(each.data))) for each in fragments[0]]
    with tempfile.TemporaryDirectory(dir=".", prefix="checkpoint-benchmark-") as folder:
        CheckpointStore(folder, keep=None, world=world).save(1, own, {})
    title = f"{len(fragments)} ranks: sent to each other rank by a save"
    return Metric(title, world.sent_bytes / 2**20, "MiB", f"{world.sent_bytes:,} bytes", MESSAGES_GOAL, "lower")


def plan_with_dcp(ranks: int, shapes: dict[str, torch.Size]) -> Metric:
    """Measure what DCP's first rank does at a save: the global plan, and the pickled metadata."""
    properties = TensorProperties(dtype=torch.float32)
    plans = []
    for rank in range(ranks):
        items = []
        for name, shape in shapes.items():
            first, rows = rows_of(shape, rank, ranks)
            if rows:
                zeros = (0,) * (len(shape) - 1)
                chunk = ChunkStorageMetadata(torch.Size((first, *zeros)), torch.Size((rows, *shape[1:])))
                data = TensorWriteData(chunk=chunk, properties=properties, size=shape)
                items.append(WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data))
        plans.append(SavePlan(items))
    begin = time.perf_counter()
    _, metadata = create_default_global_save_plan(plans)
    content = pickle.dumps(metadata)
    seconds = time.perf_counter() - begin
    return Metric(f"{ranks} ranks: DCP planning a save", seconds, "s", f"{len(content) / 2**20:.3g} MiB of metadata")


if __name__ == "__main__":
    main()
