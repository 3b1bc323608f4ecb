"""Other libraries' data loaders over one corpus, each in its natural form; loader.py compares ours with them.

    loader.py ─▶ python peers.py litdata       one process per library, so that threads and memory are separate
              ─▶ {"do": "rows", …}             a request, a line of JSON
              ◀─ {"seconds": …}                the answer

The process needs numpy and the library, and nothing of Byteloom. It runs in the Python that has the library. Each peer
is used as a competent user would: documents in stored order, no worker processes, and numpy to pack many documents into
rows at once.
"""

import gc
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

SEQUENCE_LENGTH = 8192
ROWS = 32
"""Rows of a batch."""
SEPARATOR = 256
LEVEL = 3
"""Level of zstd."""
SHARD_BYTES = 64 << 20
FRAME_BYTES = 1 << 20
"""Bytes compressed together, if the library lets its user choose."""


class Peer(Protocol):
    """Method to read a corpus that its library has stored in a folder.

    A peer that can start in the middle of an epoch also has `documents_from(folder, position, batch)`. It yields the
    documents after the first `position` of an epoch that was read in batches of `batch` documents.
    """

    files: str
    """Glob pattern of its stored files."""

    def write(self, documents: list[bytes], folder: Path) -> None:
        """Store a corpus for all peers of the library."""

    def forget(self, folder: Path) -> None:
        """Remove what reading has left behind, so that the next epoch is again a first epoch."""

    def documents(self, folder: Path) -> Iterator[bytes]:
        """Yield the documents of one epoch."""


class Webdataset:
    """Tar with one member per document, read directly or through a pipe from zstd."""

    def __init__(self, compressed: bool) -> None:
        self._library = import_module("webdataset")
        self._compressed = compressed
        self.files = "*.tar.zst" if compressed else "*.tar"

    def write(self, documents: list[bytes], folder: Path) -> None:
        folder.mkdir()
        # The default mtime, the present time as a float, adds an extended header to each member and doubles the cost of
        # reading.
        limits = {"maxcount": 10**9, "maxsize": SHARD_BYTES, "mtime": 0}
        with self._library.ShardWriter(str(folder / "%06d.tar"), verbose=0, **limits) as out:
            for number, document in enumerate(documents):
                out.write({"__key__": f"{number:09d}", "bytes": document})
        subprocess.run(["zstd", "-q", f"-{LEVEL}", *sorted(map(str, folder.glob("*.tar")))], check=True)

    def forget(self, folder: Path) -> None:
        pass

    def documents(self, folder: Path) -> Iterator[bytes]:
        prefix = "pipe:zstd -dcq " if self._compressed else ""
        urls = [f"{prefix}{path}" for path in sorted(folder.glob(self.files))]
        for sample in self._library.WebDataset(urls, shardshuffle=False):
            yield sample["bytes"]


class Mds:
    """MosaicML streaming, which inflates each whole shard to a file and reads documents from that file."""

    files = "*.mds.zstd"

    def __init__(self, keep_inflated: bool) -> None:
        self._library = import_module("streaming")
        self._keep_inflated = keep_inflated

    def write(self, documents: list[bytes], folder: Path) -> None:
        with self._library.MDSWriter(columns={"bytes": "bytes"}, out=str(folder), compression=f"zstd:{LEVEL}") as out:
            for document in documents:
                out.write({"bytes": document})

    def forget(self, folder: Path) -> None:
        if not self._keep_inflated:
            for path in folder.glob("*.mds"):
                path.unlink()

    def _open(self, folder: Path) -> Any:
        # The thread sleeps 7 ms whenever it is `predownload` documents ahead. With the default, 8 batches of 1, it
        # would deliver only 8 documents in that time.
        return self._library.StreamingDataset(local=str(folder), batch_size=ROWS, predownload=8192)

    def documents(self, folder: Path) -> Iterator[bytes]:
        for sample in self._open(folder):
            yield sample["bytes"]

    def documents_from(self, folder: Path, position: int, batch: int) -> Iterator[bytes]:
        dataset = self._open(folder)
        loader = self._library.StreamingDataLoader(dataset, batch_size=batch, collate_fn=lambda samples: samples)
        loader.load_state_dict(dataset.state_dict(position, from_beginning=True))
        try:
            for samples in loader:
                yield from (sample["bytes"] for sample in samples)
        finally:  # an abandoned epoch never stops its threads, and they keep the process alive
            dataset._iterator.non_blocking_exit()
            dataset._executor.shutdown()


class Litdata:
    """litdata with zstd frames of 256 documents (its default) or 1 MiB, which it inflates in memory."""

    files = "*.bin"

    def __init__(self) -> None:
        self._library = import_module("litdata")

    def write(self, documents: list[bytes], folder: Path) -> None:
        frame = min(256, max(1, len(documents) * FRAME_BYTES // sum(map(len, documents))))
        compression = {"compression": f"zstd:{LEVEL}", "compression_batch_size": frame}
        cache = self._library.streaming.Cache(str(folder), chunk_bytes=SHARD_BYTES, **compression)
        for number, document in enumerate(documents):
            cache[number] = document
        cache.done()
        cache.merge()

    def forget(self, folder: Path) -> None:
        pass

    def documents(self, folder: Path) -> Iterator[bytes]:
        yield from self._library.StreamingDataset(str(folder))

    def documents_from(self, folder: Path, position: int, batch: int) -> Iterator[bytes]:
        dataset = self._library.StreamingDataset(str(folder))
        loader = self._library.StreamingDataLoader(dataset, batch_size=batch, collate_fn=lambda samples: samples)
        state = {"current_epoch": 1, "num_samples_yielded": position, "latest_worker_idx": 0}
        loader.load_state_dict({**state, "dataset": dataset.state_dict(position, 0, batch)})
        for samples in loader:
            yield from samples


PEERS: dict[str, dict[str, Callable[[], Peer]]] = {
    "webdataset": {
        "webdataset tar": lambda: Webdataset(compressed=False),
        "webdataset tar.zst": lambda: Webdataset(compressed=True),
    },
    "mosaicml-streaming": {  # in this order, because the first leaves files that the second needs
        "MDS, first epoch": lambda: Mds(keep_inflated=False),
        "MDS, inflated": lambda: Mds(keep_inflated=True),
    },
    "litdata": {"litdata": Litdata},
}
"""Peers by library and by name in the table."""


def cut(raw: bytes, size: int) -> list[bytes]:
    """Cut `raw` into documents with lengths uniform between 0.5 and 1.5 times `size`."""
    lengths = np.random.default_rng(0).integers(size // 2, size * 3 // 2, 2 * len(raw) // size + 2)
    ends = np.cumsum(lengths)
    ends = np.append(ends[ends < len(raw)], len(raw)).tolist()
    return [raw[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def pack(documents: Iterator[bytes]) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Yield batches (ROWS, SEQUENCE_LENGTH) of bytes and the positions of separators in the flattened batch.

    A row holds documents with a 0 after each, and may begin or end anywhere in a document. Each byte is copied once.
    """
    want = ROWS * SEQUENCE_LENGTH
    rest, separators = memoryview(b""), np.empty(0, np.int64)  # the rest of a group ends with a separator
    while True:
        group, size = [rest[:-1]] if rest else [], len(rest)
        for document in documents:
            group.append(document)
            size += len(document) + 1
            if size >= want:
                break
        if size < want:
            return  # the last rows of an epoch do not fill a batch
        content = np.frombuffer(b"\0".join([*group, b""]), np.uint8)
        ends = np.cumsum(np.fromiter(map(len, group), np.int64, len(group)) + 1) - 1
        separators = np.concatenate([separators[:-1], ends])
        whole = size // want * want
        bounds = separators.searchsorted(np.arange(0, whole + 1, want))
        for number, rows in enumerate(content[:whole].reshape(-1, ROWS, SEQUENCE_LENGTH)):
            yield rows, separators[bounds[number] : bounds[number + 1]] - number * want
        rest, separators = memoryview(content)[whole:], separators[bounds[-1] :] - whole


def answer(peers: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """Execute one request and return its answer.

    pin          stay on one core from now on
    write        store the corpus RAW, cut into documents of about SIZE bytes, in FOLDER; return the bytes by peer
    documents    iterate over an epoch; return the seconds and the bytes
    rows         the same, packed into batches; return the seconds and the bytes in the batches
    resume       return the seconds from opening the corpus at SHARE of an epoch to the first batch of rows
    """
    if request["do"] == "pin":
        for thread in Path("/proc/self/task").iterdir():
            os.sched_setaffinity(int(thread.name), {request["core"]})
        return {}
    folder = Path(request["folder"])
    if request["do"] == "write":
        documents = cut(Path(request["raw"]).read_bytes(), request["size"])
        next(iter(peers.values())).write(documents, folder)
        return {name: sum(path.stat().st_size for path in folder.glob(peer.files)) for name, peer in peers.items()}
    peer = peers[request["peer"]]
    gc.collect()  # free the last dataset first: MDS opens a folder only once at a time
    peer.forget(folder)
    start = time.perf_counter()
    if request["do"] == "documents":
        size = sum(map(len, peer.documents(folder)))
    elif request["do"] == "rows":
        size = sum(rows.size for rows, _ in pack(peer.documents(folder)))
    else:
        batch = max(1, ROWS * SEQUENCE_LENGTH // request["size"])
        position = int(request["share"] * request["documents"]) // batch * batch
        batches = pack(
            peer.documents_from(folder, position, batch)
        )  # named, so that it is closed after the clock stops
        size = next(batches)[0].size
    return {"seconds": time.perf_counter() - start, "bytes": size}


def main() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # a library's output must not mix with answers
    try:
        peers = {name: make() for name, make in PEERS[sys.argv[1]].items()}
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision for another torch
        print(json.dumps({"absent": str(error)}), file=answers)
        return
    gc.freeze()  # imports of a library are no work of its loader
    resuming = [name for name, peer in peers.items() if hasattr(peer, "documents_from")]
    print(json.dumps({"version": version(sys.argv[1]), "resuming": resuming}), file=answers)
    for line in sys.stdin:
        try:
            print(json.dumps(answer(peers, json.loads(line))), file=answers)
        except Exception:
            traceback.print_exc()
            os._exit(1)  # a library's threads may never end


if __name__ == "__main__":
    main()
