"""What a checkpoint costs: how long the loop stands still, how fast bytes come and go, and what planning takes.

python benchmarks/checkpoint.py [--quick] [--json PATH]

One process saves and loads masters and moments of a model with 85 million parameters (1 GiB; `--quick`: 0.2 GiB) on the
disk of the working directory. Ways take turns; a share is the median of its shares in the same round. Before each one
all that was written earlier is put on disk, and what it wrote is deleted after its time has been taken.

    bare              torch.save of the same tensors to a file, which nobody waits for to be on disk
    plain copy        of one file of the same bytes, then fsync
    write             `save` of a checkpoint
    sync, async       what the loop waits for: `save`, which deletes the one before; or `begin`, and after the passes of
                      a step on one row of 1,024 bytes, what is left of the copy
    copy              the whole copy, which a loop without passes would wait for
    load              every digest compared, and copied to live tensors; files are in the page cache, as for the copy
    DCP               torch.distributed.checkpoint with fsync; nothing in it is digested

Planning is of a model with 7 billion parameters (296 tensors, thrice) on simulated ranks, each with its rows of every
tensor as FSDP2 deals them out: what the first rank does at the first save, beside what it does at the next one, and
what one rank of another number of ranks does at a load.
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
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from pretrain.checkpoint import CheckpointStore, Metadata
from pretrain.checkpoint.data import digests_of, windows_of
from pretrain.checkpoint.folder import FolderHome
from pretrain.checkpoint.format import (
    BLOCK_BYTES,
    StoredFile,
    decode_layout,
    encode_layout,
    encode_metadata,
    owned_ranges,
    plan_reads,
)
from pretrain.distributed.fragments import Fragment, whole
from pretrain.models import ByteModel, build_model, model_config
from report import Metric, options, report

KINDS = ("model", "exp_avg", "exp_avg_sq")
ROUNDS, QUICK_ROUNDS = 5, 3
RANKS, DCP_RANKS = (8, 64, 256, 1024), (8, 64, 256)
STALL_GOAL, WRITE_GOAL, LOAD_GOAL, PLAN_GOAL = 0.10, 0.8, 0.7, 10.0


def main() -> None:
    chosen = options(__doc__)
    metrics = io_metrics(chosen.quick) + planning_metrics(chosen.quick)
    report("Checkpoints", metrics, chosen.json)


def model_of(width: int, layers: int) -> ByteModel:
    """On the meta device."""
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
        """Of the times of two ways; of speeds where more is better."""
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
        share("load", "plain copy", "load, verified", LOAD_GOAL, "higher"),
        share("load", "plain read", "load, verified", None, "higher"),
        share("DCP save", "plain copy", "DCP: write", None, "higher"),
        share("DCP load", "plain copy", "DCP: load", None, "higher"),
        Metric(
            "a loop beside an async save",
            statistics.median(seconds["beside"]) / statistics.median(seconds["alone"]),
            "of its time alone",
            f"products of matrices on {torch.get_num_threads()} threads",
            None,
            "lower",
        ),
        *digest_metrics(),
    ]


class Bench:
    """Ways to write and read the masters and moments of a model, which take turns."""

    def __init__(self, folder: Path, model: ByteModel) -> None:
        self.folder = folder
        self.model = model
        self.tensors = tensors = {
            f"{kind}/{name}": parameter.data.normal_(std=0.02) if kind == "model" else torch.randn(parameter.shape)
            for kind in KINDS
            for name, parameter in model.named_parameters()
        }
        self.fragments = fragments = [whole(name, tensor) for name, tensor in tensors.items()]
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
        """Seconds by way. The first round, in which buffers are made, does not count."""
        ways: dict[str, Callable[[], float]] = {
            "bare": lambda: self.timed(lambda: torch.save(self.tensors, self.folder / "bare")),
            "plain copy": lambda: self.timed(self.plain_copy),
            "write": lambda: self.timed(lambda: self.all.save(1, self.fragments, {})),
            "sync": lambda: self.timed(self.save),
            "async": self.stall,
            "copy": self.copy,
            "plain read": lambda: self.timed(self.plain_read),
            "load": lambda: self.timed(lambda: self.kept.load(lambda metadata: self.fragments)),
            "DCP save": lambda: self.timed(self.dcp_save),
            "DCP load": lambda: self.timed(self.dcp_load),
            "alone": lambda: self.products(20),
            "beside": self.beside,
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(1 + count):
            for name, way in ways.items():
                os.sync()
                seconds[name].append(way())
                for left in ("bare", "copy", "all", "dcp"):
                    path = self.folder / left
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
        """Seconds of one, on average."""
        return self.timed(lambda: [self.matrix @ self.matrix for _ in range(count)]) / count

    def beside(self) -> float:
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
        metrics += plan_with(ranks, shapes)
    for ranks in DCP_RANKS[: 1 if quick else None]:
        metrics.append(plan_with_dcp(ranks, shapes))
    return metrics


def rows_of(shape: torch.Size, rank: int, ranks: int) -> tuple[int, int]:
    """First row and number of rows of one rank, as torch.chunk deals them out."""
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


def plan_with(ranks: int, shapes: dict[str, torch.Size]) -> list[Metric]:
    of_ranks = [owned_ranges(fragments_of(shapes, rank, ranks)) for rank in range(ranks)]
    told = [json.dumps(owned) for owned in of_ranks]
    begin = time.perf_counter()
    layout = encode_layout([json.loads(text) for text in told])
    once = time.perf_counter() - begin
    fragments = fragments_of(shapes, 0, ranks)
    begin = time.perf_counter()
    assert owned_ranges(fragments) == of_ranks[0]
    after = time.perf_counter() - begin
    files = []
    for rank, owned in enumerate(of_ranks):
        size = 4 * sum(owned["lengths"])
        files.append(StoredFile(f"rank-{rank:05d}.bin", size, ("0" * 64,) * -(-size // BLOCK_BYTES)))
    marker = encode_metadata(files, StoredFile("layout.json", len(layout), ("0" * 64,)), {})
    others = max(1, ranks * 3 // 4)
    wanted = fragments_of(shapes, others // 2, others)
    begin = time.perf_counter()
    metadata = Metadata(FolderHome(Path()), "step", "", tuple(files), decode_layout(layout), {})
    windows = windows_of(plan_reads(metadata, wanted))
    load = time.perf_counter() - begin
    read = sum((window.end - window.begin) * BLOCK_BYTES for window in windows)
    needed = 4 * sum(len(fragment.data) for fragment in wanted)
    goal = PLAN_GOAL if ranks == max(RANKS) else None
    size = f"{(len(layout) + len(marker)) / 2**20:.3g} MiB of metadata"
    return [
        Metric(f"{ranks} ranks: planning the first save", once, "s", size, goal, "lower"),
        Metric(f"{ranks} ranks: planning the next save", after, "s", "", None, "lower"),
        Metric(f"{ranks} ranks: planning a load by one of {others}", load, "s",
               f"{len(windows):,} reads, {read / needed:.2f} of the bytes it needs", None, "lower"),
    ]  # fmt: skip


def plan_with_dcp(ranks: int, shapes: dict[str, torch.Size]) -> Metric:
    """What DCP's first rank does at a save: the global plan, and the metadata, a pickle."""
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
