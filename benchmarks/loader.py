"""Our loader against other people's and against the bare limit, on one corpus, one core, in one run.

python benchmarks/loader.py [--quick] [--json PATH]

The corpus is the Python sources of this interpreter's standard library and packages, end to end, cut into documents of
about each size and stored by each library in its natural form, with zstd level 3 where it has zstd. Every reader
delivers the same: batches of 32 rows of 8,192 bytes with a 0 after each document, and the places of these separators.
Rates are MB/s of corpus bytes.

    limit     reads each block that ours stored and decompresses it, nothing else
    ours      a Loader with one thread, between batches far from its start: verified, in a run's order
    peers     an epoch in stored order, without worker processes, packed by numpy; see peers.py

Files are in the page cache. webdataset is measured in this Python. MosaicML streaming and litdata want another numpy
and another torch, so they have a venv of their own; without it the table says that they are missing:

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
from peers import FRAME_BYTES, LEVEL, PEERS, ROWS, SEQUENCE_LENGTH, SHARD_BYTES, cut
from report import Metric, options, report

HERE = Path(__file__).parent
SIZES = {"0.5 KB": 512, "2 KB": 2048, "16 KB": 16 << 10, "256 KB": 256 << 10}
LANES = DataConfig.model_fields["lanes"].default
BLOCKS_PER_LANE = 16
WINDOWS = 8
"""The fewest that our loader is timed over."""
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
    """A process that measures the peers of one library, or knows that the library is not there."""

    def __init__(self, name: str) -> None:
        own_venv = HERE.parent / ".venv-peers" / "bin" / "python"
        python = own_venv if own_venv.exists() and name != "webdataset" else sys.executable
        command = [python, "-P", HERE / "peers.py", name]
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
        """Names of what can be measured."""
        return [] if "absent" in self.about else list(PEERS[self.name])

    def send(self, **request: object) -> None:
        print(json.dumps(request, default=str), file=self._process.stdin, flush=True)

    def receive(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process that measures {self.name} has ended with {self._process.wait()}")
        return json.loads(line)

    def ask(self, **request: object) -> dict[str, Any]:
        """The answer to a request; nothing where the library is not there."""
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
    """One corpus in every form."""

    folder: Path
    size: int
    """Of a document, about."""
    documents: int
    raw_bytes: int
    shares: dict[str, float]
    """By reader: bytes on disk per corpus byte."""

    @property
    def per_id(self) -> float:
        """Corpus bytes per id of a row: the rest are separators."""
        return self.raw_bytes / (self.raw_bytes + self.documents)


def sources(size: int) -> bytes:
    """The first bytes of all Python sources of this interpreter, in the order of their paths."""
    folders = [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))]
    raw = bytearray()
    for path in (path for folder in folders for path in sorted(folder.rglob("*.py"))):
        raw += path.read_bytes()
        if len(raw) >= size:
            break
    return bytes(raw[:size])


def write_all(libraries: list[Library], raw: bytes, size: int, folder: Path) -> Stored:
    """Stores a corpus with every library, and ours."""
    own = folder / str(size)
    own.mkdir()
    documents = cut(raw, size)
    shares = {"ours": write_ours(documents, own / "ours")}
    there = [library for library in libraries if library.peers]
    for library in there:
        library.send(do="write", raw=folder / "raw", size=size, folder=own / library.name)
    for library in there:
        shares |= {peer: stored / len(raw) for peer, stored in library.receive().items()}
    return Stored(own, size, len(documents), len(raw), shares)


def write_ours(documents: list[bytes], folder: Path) -> float:
    """Stores a corpus in our form: bytes on disk per corpus byte.

    Its shards are listed again and again under other names, until each lane has many blocks, as in a corpus of a usual
    size. In a small one lanes share blocks, which are then decompressed twice.
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
        again = shards[number % len(shards)]
        name = shard_name(number)
        (folder / name).hardlink_to(folder / again.entry["name"])
        shards.append(replace(again, entry=again.entry | {"name": name}))
    write_index(folder, shards)
    return share


def throughput(label: str, corpus: Stored, libraries: list[Library], rounds: int) -> list[Metric]:
    """Every reader in turn; limit and ours again before each library, since all else is held to them."""
    decompress_blocks(corpus)
    seconds = defaultdict(list)  # of each reader's epoch
    beside = defaultdict(list)  # peer / ours, of measurements that follow each other
    alone = {}  # of documents without rows
    with_digests = []  # ours / limit
    for _ in range(rounds):
        for library in libraries:
            seconds["limit"].append(decompress_blocks(corpus))
            seconds["ours"].append(read_ours(corpus))
            for peer in library.peers:
                request = {"peer": peer, "folder": corpus.folder / library.name}
                if peer not in alone:
                    alone[peer] = library.ask(do="documents", **request)["seconds"]
                rows = library.ask(do="rows", **request)
                seconds[peer].append(rows["seconds"] / (rows["bytes"] * corpus.per_id) * corpus.raw_bytes)
                beside[peer].append(seconds[peer][-1] / seconds["ours"][-1])
        with_digests.append(seconds["limit"][-1] / read_ours(corpus, digest=True))
    speed = {name: corpus.raw_bytes / median(times) / 1e6 for name, times in seconds.items()}
    share = median(limit / ours for limit, ours in zip(seconds["limit"], seconds["ours"], strict=True))
    stored = {name: f"stored in {share:.2f} of its bytes" for name, share in corpus.shares.items()}
    metrics = [
        Metric(f"{label}: limit", speed["limit"], "MB/s", "pread and zstd of the blocks of ours"),
        Metric(f"{label}: ours", speed["ours"], "MB/s", f"{LANES} lanes, 1 thread; {stored['ours']}"),
    ]
    metrics += [
        Metric(
            f"{label}: {peer}",
            speed[peer],
            "MB/s",
            f"{corpus.raw_bytes / alone[peer] / 1e6:.3g} as documents, without rows; {stored[peer]}",
        )
        for peer in beside
    ]
    detail = f"{median(with_digests):.2f} with the digests that a training run keeps"
    metrics.append(Metric(f"{label}: ours / limit", share, "", detail, goal=0.85))
    if "webdataset tar" in beside:
        goal = 4 if label == "2 KB" else None
        ratio = median(beside["webdataset tar"])
        metrics.append(Metric(f"{label}: ours / webdataset", ratio, "", "reading tar", goal=goal))
    if beside:
        fastest = min(beside, key=lambda peer: median(beside[peer]))
        metrics.append(Metric(f"{label}: ours / fastest peer", median(beside[fastest]), "", fastest, goal=1))
    return metrics


def decompress_blocks(corpus: Stored) -> float:
    """Seconds for the limit: the same blocks, read and decompressed by one reused decompressor."""
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
    """Seconds for as many bytes as the corpus has, from a loader that has been going for a while.

    It reads ahead in windows, and for ever. The clock starts and stops as the first batch of a window arrives: none of
    the next has been read then, so what is measured is the work for the batches that come in between.
    """
    stream = open_ours(corpus)
    window = max(1, WINDOW // SEQUENCE_LENGTH // ROWS)
    epoch = corpus.raw_bytes / corpus.per_id / SEQUENCE_LENGTH / ROWS
    batches = max(WINDOWS, round(epoch / window)) * window
    arguments = {"global_batch": ROWS, "micro_batch": ROWS, "digest": digest}
    gc.collect()
    with Loader(stream, LoaderConfig(threads=1), **arguments) as loader:
        arriving = iter(loader)
        for _ in range(2 * window):  # windows grow to full size, which adds up to one less than one of them
            next(arriving)
        start = time.perf_counter()
        for _ in range(batches):
            batch = next(arriving)
        seconds = time.perf_counter() - start
    stream.corpus.close()
    assert batch.micro_batches[0].rows.bytes.shape == (ROWS, SEQUENCE_LENGTH)
    return seconds / (batches * ROWS * SEQUENCE_LENGTH * corpus.per_id) * corpus.raw_bytes


def resume(corpus: Stored, libraries: list[Library], times: int) -> list[Metric]:
    """Opening a corpus at random positions of an epoch, to the first batch of rows."""
    generator = random.Random(0)
    seconds = defaultdict(list)
    for share in (generator.uniform(0.05, 0.9) for _ in range(times)):
        seconds["ours"].append(resume_ours(corpus, share))
        for library in libraries:
            for peer in library.about.get("resuming", ()):
                request = {"peer": peer, "folder": corpus.folder / library.name, "share": share, "size": corpus.size}
                answer = library.ask(do="resume", documents=corpus.documents, **request)
                seconds[peer].append(answer["seconds"])
    details = dict.fromkeys(seconds, "without the row it was in the middle of") | {
        "ours": f"exact; {ROWS} blocks to decompress, one for each row"
    }
    metrics = [
        Metric(f"resume: {name}", median(measured) * 1e3, "ms", details[name], better="lower")
        for name, measured in seconds.items()
    ]
    rest = {name: median(measured) for name, measured in seconds.items() if name != "ours"}
    if rest:
        fastest = min(rest, key=rest.__getitem__)
        ratio = median(seconds["ours"]) / rest[fastest]
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
    """Which libraries were there, of those that ours is compared with."""
    there, absent = [], []
    for library in libraries:
        if "absent" in library.about:
            absent.append(f"{library.name} is not installed: {library.about['absent']}")
        else:
            there.append(f"{library.name} {library.about['version']}")
    return Metric("libraries measured", len(there), f"of {len(libraries)}", "; ".join(there + absent))


if __name__ == "__main__":
    main()
