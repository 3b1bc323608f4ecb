"""Cost of opening a corpus of ten million blocks (about 10 TB of raw bytes) and of locating a sequence in it.

python benchmarks/scale.py [--quick] [--json PATH]

Manifest and index are synthetic: 10,000 shards of 1,000 blocks. The shards themselves do not exist. A new process opens
the corpus, as each rank of a run does. --quick repeats the same measurement fewer times.
"""

import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.report import Metric, options, report
from data_pipeline.corpus.index import BLOCK, LENGTHS, ShardIndex
from data_pipeline.corpus.manifest import write_index
from data_pipeline.corpus.tar import shard_name

SHARDS = 10_000
BLOCKS_OF_A_SHARD = 1_000

OPEN = """
import json, random, re, sys, time
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.stream.byte_stream import ByteStream, PackingConfig

def peak():  # getrusage would return the peak of the parent process
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

def lookup(sequences):
    start = time.perf_counter()
    for sequence in sequences:
        stream.order.locate(sequence)
    return (time.perf_counter() - start) / len(sequences)

measured = {"imported": peak()}
start = time.perf_counter()
corpus = Corpus(sys.argv[1], check_shards=False)
measured |= {"opened": time.perf_counter() - start, "memory_of_corpus": peak()}
stream = ByteStream(corpus, PackingConfig(), 8192, lanes=128, seed=0, bad_blocks=0)
stream.order.locate(0)
measured |= {"ready": time.perf_counter() - start, "memory_of_stream": peak()}
count, first = stream.sequences_per_epoch, stream.sequences_per_epoch // 3
measured["next"] = lookup(range(first, first + 100_000))
measured["random"] = lookup([random.randrange(count) for _ in range(20_000)])
print(json.dumps(measured))
"""


def main() -> None:
    chosen = options(__doc__)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_index(folder, synthetic_shards())
        runs = [measure_opening(folder) for _ in range(3 if chosen.quick else 9)]
    median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    metrics = [
        Metric("open the corpus", median["opened"], "s", "manifest and 1.1 GB of index, digests checked", 2, "lower"),
        Metric("ready to read", median["ready"], "s", "corpus open, order of the first epoch computed", 2, "lower"),
        Metric("memory, corpus open", median["memory_of_corpus"], "MiB", "peak resident size of the process"),
        Metric("memory, ready to read", median["memory_of_stream"], "MiB", "peak resident size", 300, "lower"),
        Metric("memory before opening", median["imported"], "MiB", "Python, NumPy and the package"),
        Metric("one lookup", median["next"] * 1e6, "µs", "Order.locate of consecutive sequences", 5, "lower"),
        Metric("one random lookup", median["random"] * 1e6, "µs", "Order.locate of a random sequence"),
    ]
    report(f"A corpus of {SHARDS * BLOCKS_OF_A_SHARD:,} blocks", metrics, chosen.json)


def synthetic_shards() -> Iterator[ShardIndex]:
    random = np.random.default_rng(0)
    for number in range(SHARDS):
        lengths = np.zeros(BLOCKS_OF_A_SHARD, LENGTHS)
        lengths["raw_bytes"] = random.integers(900_000, 1 << 20, BLOCKS_OF_A_SHARD)
        lengths["documents"] = lengths["document_ends"] = random.integers(1, 400, BLOCKS_OF_A_SHARD)
        blocks = np.frombuffer(random.bytes(BLOCKS_OF_A_SHARD * BLOCK.itemsize), BLOCK).copy()
        entry = {
            "name": shard_name(number),
            "blocks": BLOCKS_OF_A_SHARD,
            "documents": int(lengths["documents"].sum()),
            "raw_bytes": int(lengths["raw_bytes"].sum()),
            "modalities": ["text"],
            "bytes": 300_000_000,
            "sha256": hashlib.sha256(str(number).encode()).hexdigest(),
        }
        yield ShardIndex(entry, lengths, blocks)


def measure_opening(folder: Path) -> dict[str, float]:
    """Return the measurements of a new process."""
    done = subprocess.run([sys.executable, "-c", OPEN, str(folder)], stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


if __name__ == "__main__":
    main()
