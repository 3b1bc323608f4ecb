"""Comparison of our loader with other libraries' and with the limit of the machine, on one corpus and one core.

python benchmarks/loader.py [--quick] [--json PATH]

The corpus is the Python sources of this interpreter's standard library and packages, concatenated and cut into
documents of about each size. Each library stores it in its natural form, with zstd level 3 if it has zstd. Every reader
delivers the same: batches of 32 rows of 8,192 bytes with a 0 after each document, and the positions of these
separators. Rates are MB/s of corpus bytes.

    limit     read and decompress each block of our corpus, nothing else
    ours      a Loader with one thread, measured between batches far from its start: verified, in a run's order
    peers     an epoch in stored order, without worker processes, packed by numpy; see common/peers.py

Files are in the page cache. webdataset is measured in this Python. MosaicML streaming and litdata need another numpy
and another torch, so they have their own venv. Without it the table reports them as missing:

    python -m venv .venv-peers
    .venv-peers/bin/pip install mosaicml-streaming==0.13.0 litdata==0.2.76
"""

import gc
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, Self

import zstandard

from common.peers import FRAME_BYTES, LEVEL, PEERS, ROWS, SEQUENCE_LENGTH, SHARD_BYTES, cut
from common.report import Metric, options, report
from data_pipeline.corpus.blocks import pack_documents
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.index import write_shard
from data_pipeline.corpus.manifest import write_index
from data_pipeline.corpus.tar import shard_name
from data_pipeline.documents import Document
from data_pipeline.errors import BadDocumentError
from data_pipeline.stream.byte_stream import ByteStream
from data_pipeline.stream.config import DataConfig
from data_pipeline.stream.loader import WINDOW, Loader, LoaderConfig
from data_pipeline.stream.reading import open_streams

HERE = Path(__file__).parent
SIZES = {"0.5 KB": 512, "2 KB": 2048, "16 KB": 16 << 10, "256 KB": 256 << 10}
LANES = DataConfig.model_fields["lanes"].default
BLOCKS_PER_LANE = 16
WINDOWS = 8
"""Minimum number of windows over which our loader is timed."""
RESUME_SIZE = "2 KB"


def main() -> None:
    chosen = options(__doc__)
    megabytes, rounds, resumes = (4, 1, 3) if chosen.quick else (64, 3, 9)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        libraries = [stack.enter_context(Library(name)) for name in PEERS]
        raw = sources(megabytes << 20)
        (folder / "raw").write_bytes(raw)
        corpora = {label: write_all(libraries, raw, size, folder) for label, size in SIZES.items()}
        core = max(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {core})
        for library in libraries:
            library.ask(do="pin", core=core)
        metrics = [peers_metric(libraries)]
        for label, corpus in corpora.items():
            metrics += throughput(label, corpus, libraries, rounds)
        metrics += resume(corpora[RESUME_SIZE], libraries, resumes)
    report(f"Reading {len(raw) / 1e6:.0f} MB on one core", metrics, chosen.json)


class Library:
    """Process that measures the peers of one library, or reports that the library is missing."""

    def __init__(self, name: str) -> None:
        own_venv = HERE.parent / ".venv-peers" / "bin" / "python"
        python = own_venv if own_venv.exists() and name != "webdataset" else sys.executable
        command = [python, "-P", HERE / "common/peers.py", name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._about: dict[str, Any] | None = None
        self.name = name

    @property
    def about(self) -> dict[str, Any]:
        if self._about is None:
            self._about = self.receive()
        return self._about

    @property
    def peers(self) -> list[str]:
        """Names of the peers that can be measured."""
        return [] if "absent" in self.about else list(PEERS[self.name])

    def send(self, **request: object) -> None:
        print(json.dumps(request, default=str), file=self._process.stdin, flush=True)

    def receive(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process that measures {self.name} has ended with {self._process.wait()}")
        return json.loads(line)

    def ask(self, **request: object) -> dict[str, Any]:
        """Send a request and return the answer, empty if the library is missing."""
        if "absent" in self.about:
            return {}
        self.send(**request)
        return self.receive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()


@dataclass(frozen=True)
class Stored:
    """One corpus in the form of every library."""

    folder: Path
    size: int
    """Approximate bytes of a document."""
    documents: int
    raw_bytes: int
    shares: dict[str, float]
    """Bytes on disk per corpus byte, by reader."""

    @property
    def per_id(self) -> float:
        """Corpus bytes per id of a row; the other ids are separators."""
        return self.raw_bytes / (self.raw_bytes + self.documents)


def sources(size: int) -> bytes:
    """Return the first bytes of all Python sources of this interpreter, in the order of their paths."""
    folders = [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))]
    raw = bytearray()
    for path in (path for folder in folders for path in sorted(folder.rglob("*.py"))):
        raw += path.read_bytes()
        if len(raw) >= size:
            break
    return bytes(raw[:size])


def write_all(libraries: list[Library], raw: bytes, size: int, folder: Path) -> Stored:
    """Store a corpus in the form of every library and in ours."""
    own = folder / str(size)
    own.mkdir()
    documents = cut(raw, size)
    shares = {"ours": write_ours(documents, own / "ours")}
    available = [library for library in libraries if library.peers]
    for library in available:
        library.send(do="write", raw=folder / "raw", size=size, folder=own / library.name)
    for library in available:
        shares |= {peer: stored / len(raw) for peer, stored in library.receive().items()}
    return Stored(own, size, len(documents), len(raw), shares)


def write_ours(documents: list[bytes], folder: Path) -> float:
    """Store a corpus in our form, and return the bytes on disk per corpus byte.

    The manifest lists its shards repeatedly under other names, until each lane has many blocks, as in a corpus of usual
    size. In a small corpus, lanes share blocks, which are then decompressed twice.
    """

    def refuse(_: Document, error: BadDocumentError) -> None:
        raise error

    as_documents = (
        Document(f"{number:09d}", "code", lambda piece=piece: iter((piece,))) for number, piece in enumerate(documents)
    )
    blocks = pack_documents(as_documents, FRAME_BYTES, refuse)
    folder.mkdir()
    shards = []
    while shard := write_shard(folder, len(shards), islice(blocks, SHARD_BYTES // FRAME_BYTES), LEVEL):
        shards.append(shard)
    share = sum(shard.entry["bytes"] for shard in shards) / sum(shard.entry["raw_bytes"] for shard in shards)
    count = sum(shard.entry["blocks"] for shard in shards)
    for number in range(len(shards), len(shards) * -(-LANES * BLOCKS_PER_LANE // count)):
        repeated = shards[number % len(shards)]
        name = shard_name(number)
        (folder / name).hardlink_to(folder / repeated.entry["name"])
        shards.append(replace(repeated, entry=repeated.entry | {"name": name}))
    write_index(folder, shards)
    return share


def throughput(label: str, corpus: Stored, libraries: list[Library], rounds: int) -> list[Metric]:
    """Measure every reader in turn. Limit and ours are measured again before each library, as its reference."""
    decompress_blocks(corpus)
    seconds = defaultdict(list)  # epoch seconds by reader
    ratios = defaultdict(list)  # peer / ours, from consecutive measurements
    documents_only = {}  # seconds of documents without rows
    with_digests = []  # ours / limit
    for _ in range(rounds):
        for library in libraries:
            seconds["limit"].append(decompress_blocks(corpus))
            seconds["ours"].append(read_ours(corpus))
            for peer in library.peers:
                request = {"peer": peer, "folder": corpus.folder / library.name}
                if peer not in documents_only:
                    documents_only[peer] = library.ask(do="documents", **request)["seconds"]
                rows = library.ask(do="rows", **request)
                seconds[peer].append(rows["seconds"] / (rows["bytes"] * corpus.per_id) * corpus.raw_bytes)
                ratios[peer].append(seconds[peer][-1] / seconds["ours"][-1])
        with_digests.append(seconds["limit"][-1] / read_ours(corpus, digest=True))
    speed = {name: corpus.raw_bytes / median(times) / 1e6 for name, times in seconds.items()}
    share = median(limit / ours for limit, ours in zip(seconds["limit"], seconds["ours"], strict=True))
    stored = {name: f"stored in {share:.2f} of its bytes" for name, share in corpus.shares.items()}
    metrics = [
        Metric(f"{label}: limit", speed["limit"], "MB/s", "pread and zstd of our blocks"),
        Metric(f"{label}: ours", speed["ours"], "MB/s", f"{LANES} lanes, 1 thread; {stored['ours']}"),
    ]
    metrics += [
        Metric(
            f"{label}: {peer}",
            speed[peer],
            "MB/s",
            f"{corpus.raw_bytes / documents_only[peer] / 1e6:.3g} as documents, without rows; {stored[peer]}",
        )
        for peer in ratios
    ]
    detail = f"{median(with_digests):.2f} with the digests of a training run"
    metrics.append(Metric(f"{label}: ours / limit", share, "", detail, goal=0.85))
    if "webdataset tar" in ratios:
        goal = 4 if label == "2 KB" else None
        ratio = median(ratios["webdataset tar"])
        metrics.append(Metric(f"{label}: ours / webdataset", ratio, "", "reading tar", goal=goal))
    if ratios:
        fastest = min(ratios, key=lambda peer: median(ratios[peer]))
        metrics.append(Metric(f"{label}: ours / fastest peer", median(ratios[fastest]), "", fastest, goal=1))
    return metrics


def decompress_blocks(corpus: Stored) -> float:
    """Return the seconds of the limit: read the same blocks and decompress them with one decompressor."""
    with Corpus(corpus.folder / "ours") as ours:
        fields = ("shard", "frame_bytes", "frame_offset")
        once = corpus.raw_bytes >= ours.lengths["raw_bytes"].cumsum(dtype="i8")  # the shards are listed several times
        frames = list(zip(*(ours.index[field][once].tolist() for field in fields), strict=True))
        names = [shard["name"] for shard in ours.manifest["shards"][: frames[-1][0] + 1]]
    files = [os.open(corpus.folder / "ours" / name, os.O_RDONLY) for name in names]
    decompressor = zstandard.ZstdDecompressor()
    gc.collect()
    start = time.perf_counter()
    for shard, size, offset in frames:
        decompressor.decompress(os.pread(files[shard], size, offset))
    seconds = time.perf_counter() - start
    for file in files:
        os.close(file)
    return seconds


def open_ours(corpus: Stored) -> ByteStream:
    config = DataConfig(shards=str(corpus.folder / "ours"))
    (stream,) = open_streams(config, SEQUENCE_LENGTH).values()
    return stream


def read_ours(corpus: Stored, digest: bool = False) -> float:
    """Return the seconds for the bytes of one epoch, from a loader that has been running for a while.

    The loader prefetches in windows, without end. The clock starts and stops when the first batch of a window arrives.
    Nothing of the next window has been read then, so the time is exactly that of the batches in between.
    """
    stream = open_ours(corpus)
    window = max(1, WINDOW // SEQUENCE_LENGTH // ROWS)
    epoch = corpus.raw_bytes / corpus.per_id / SEQUENCE_LENGTH / ROWS
    batches = max(WINDOWS, round(epoch / window)) * window
    arguments = {"global_batch": ROWS, "micro_batch": ROWS, "digest": digest}
    gc.collect()
    with Loader(stream, LoaderConfig(threads=1), **arguments) as loader:
        arriving = iter(loader)
        for _ in range(
            2 * window
        ):  # windows grow to full size; the smaller ones add up to one batch less than a full window
            next(arriving)
        start = time.perf_counter()
        for _ in range(batches):
            batch = next(arriving)
        seconds = time.perf_counter() - start
    stream.corpus.close()
    assert batch.micro_batches[0].rows.bytes.shape == (ROWS, SEQUENCE_LENGTH)
    return seconds / (batches * ROWS * SEQUENCE_LENGTH * corpus.per_id) * corpus.raw_bytes


def resume(corpus: Stored, libraries: list[Library], times: int) -> list[Metric]:
    """Measure the time from opening a corpus at random positions of an epoch to the first batch of rows."""
    generator = random.Random(0)
    seconds = defaultdict(list)
    for share in (generator.uniform(0.05, 0.9) for _ in range(times)):
        seconds["ours"].append(resume_ours(corpus, share))
        for library in libraries:
            for peer in library.about.get("resuming", ()):
                request = {"peer": peer, "folder": corpus.folder / library.name, "share": share, "size": corpus.size}
                answer = library.ask(do="resume", documents=corpus.documents, **request)
                seconds[peer].append(answer["seconds"])
    details = dict.fromkeys(seconds, "skips the row it was in") | {
        "ours": f"exact; {ROWS} blocks to decompress, one per row"
    }
    metrics = [
        Metric(f"resume: {name}", median(measured) * 1e3, "ms", details[name], better="lower")
        for name, measured in seconds.items()
    ]
    peer_times = {name: median(measured) for name, measured in seconds.items() if name != "ours"}
    if peer_times:
        fastest = min(peer_times, key=peer_times.__getitem__)
        ratio = median(seconds["ours"]) / peer_times[fastest]
        detail = f"{fastest}; webdataset cannot"
        metrics.append(Metric("resume: ours / fastest peer", ratio, "", detail, better="lower"))
    return metrics


def resume_ours(corpus: Stored, share: float) -> float:
    gc.collect()
    start = time.perf_counter()
    stream = open_ours(corpus)
    first = int(share * stream.sequences_per_epoch)
    arguments = {"global_batch": ROWS, "micro_batch": ROWS, "first_sequence": first}
    with Loader(stream, LoaderConfig(threads=1), **arguments) as loader:
        next(iter(loader))
        seconds = time.perf_counter() - start
    stream.corpus.close()
    return seconds


def peers_metric(libraries: list[Library]) -> Metric:
    """Return the number of libraries that were measured, and why the others were not."""
    available, absent = [], []
    for library in libraries:
        if "absent" in library.about:
            absent.append(f"{library.name} is not installed: {library.about['absent']}")
        else:
            available.append(f"{library.name} {library.about['version']}")
    return Metric("libraries measured", len(available), f"of {len(libraries)}", "; ".join(available + absent))


if __name__ == "__main__":
    main()
