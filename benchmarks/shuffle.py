"""Quality of the shuffle of an epoch, compared with a uniform shuffle, and the blocks that each batch reads.

python benchmarks/shuffle.py [--quick] [--json PATH]

Two rows of a batch meet again if a batch of the next epoch has both. A row is followed by its middle byte, because the
borders between rows differ from epoch to epoch. A uniform shuffle of N rows gives (batch - 1) / (N - 1) of the pairs.
The corpora are made up: blocks of 0.97 to 1 MiB, 128 lanes. Blocks are counted while a stream reads batch by batch,
from the second epoch on. Version 2 of the order is measured too; new runs have version 3.
"""

from statistics import mean

import numpy as np
from numpy.typing import NDArray

from common.report import Metric, options, report
from data_pipeline.corpus.index import LENGTHS
from data_pipeline.stream.byte_stream import ByteStream, PackingConfig

CASES = {
    # bytes of the corpus, sequence length, global batch
    "4 MB": (4_000_000, 512, 32),
    "10 MB": (10_000_000, 512, 32),
    "100 MB": (100_000_000, 1024, 32),
    "1 GB": (1_000_000_000, 8192, 128),
}
LANES = 128


def main() -> None:
    chosen = options(__doc__)
    seeds = range(1 if chosen.quick else 5)
    metrics = []
    for label, (size, length, batch) in CASES.items():
        older, newer = ([stream_of(size, length, seed, version) for seed in seeds] for version in (2, 3))
        uniform = (batch - 1) / (newer[0].sequences_per_epoch - 1)
        shares = [mean(share_that_meets_again(stream, batch) for stream in streams) for streams in (older, newer)]
        metrics += [
            Metric(f"{label}: pairs, uniform", uniform * 100, "%", f"rows of {length:,}, batches of {batch}"),
            Metric(f"{label}: pairs, version 2", shares[0] * 100, "%", ""),
            Metric(f"{label}: pairs, version 3", shares[1] * 100, "%", "", 5, "lower"),
        ]
        if size >= 10_000_000:
            metrics.append(Metric(f"{label}: version 3 / uniform", shares[1] / uniform, "", "", 2, "lower"))
        metrics += reads(label, older[0], newer[0], batch, 2 if chosen.quick else 3)
    report("Shuffle", metrics, chosen.json)


class MadeUpCorpus:
    """A corpus whose blocks are zeros. It counts what is read."""

    location = "made up"
    content_sha256 = "0"

    def __init__(self, size: int) -> None:
        blocks = -(-size // (1 << 20))
        self.lengths = np.zeros(blocks, LENGTHS)
        self.lengths["raw_bytes"] = np.random.default_rng(0).integers(1_017_000, 1 << 20, blocks)
        self.raw_bytes = int(self.lengths["raw_bytes"].sum())
        self.reads = self.bytes_read = 0

    def read_content(self, block: int, through: int) -> tuple[bytes, NDArray[np.uint32]]:
        size = int(self.lengths[block]["raw_bytes"])
        self.reads += 1
        self.bytes_read += size
        return bytes(size), np.empty(0, np.uint32)


def stream_of(size: int, length: int, seed: int, version: int) -> ByteStream:
    return ByteStream(
        MadeUpCorpus(size), PackingConfig(), length, lanes=LANES, seed=seed, bad_blocks=0, version=version
    )


def share_that_meets_again(stream: ByteStream, batch: int) -> float:
    """Share of the row pairs of a batch that meet again in a batch of the next epoch."""
    order, count = stream.order, stream.sequences_per_epoch
    before = np.concatenate([[0], np.cumsum(stream.corpus.lengths["raw_bytes"], dtype=np.int64)])
    starts, rows, first = [], [], []
    for sequence in range(2 * count):
        pieces = order.locate(sequence)
        first.append(before[pieces[0].block] + pieces[0].start)
        if sequence >= count:
            starts += [before[piece.block] + piece.start for piece in pieces]
            rows += [sequence] * len(pieces)
    along = np.argsort(starts)
    middles = np.array(first[:count]) + order.sequence_length // 2
    after = np.array(rows)[along[np.array(starts)[along].searchsorted(middles, "right") - 1]]
    batches = np.arange(count) // batch
    _, together = np.unique(batches * (1 << 32) + after // batch, return_counts=True)
    pairs = np.bincount(batches)
    return float((together * (together - 1)).sum() / (pairs * (pairs - 1)).sum())


def reads(label: str, older: ByteStream, newer: ByteStream, batch: int, epochs: int) -> list[Metric]:
    """Blocks read a batch by each version, after the first epoch."""
    metrics = []
    for version, stream in ((2, older), (3, newer)):
        count = stream.sequences_per_epoch
        for epoch in range(epochs):
            if epoch == 1:
                stream.corpus.reads = stream.corpus.bytes_read = 0
            for start in range(epoch * count, (epoch + 1) * count, batch):
                stream.read(np.arange(start, min(start + batch, (epoch + 1) * count)))
        batches = (epochs - 1) * count / batch
        detail = f"{stream.corpus.bytes_read / batches / 1e6:.3g} MB decompressed a batch"
        metrics.append(Metric(f"{label}: blocks a batch, version {version}", stream.corpus.reads / batches, "", detail))
    return metrics


if __name__ == "__main__":
    main()
