"""The loader against the bare limit (decompressing the same blocks) and against webdataset reading the same shards.

python benchmarks/loader.py [--quick] [--json PATH]

The corpus is Python's own standard library, prepared in a temporary folder.
"""

import json
import sysconfig
import tempfile
from pathlib import Path

import webdataset
import zstandard

from data_pipeline.loader import Loader, LoaderConfig
from data_pipeline.prepare import PrepareOptions, prepare
from data_pipeline.shards import Corpus
from data_pipeline.stream import ByteStream, StreamConfig
from report import Metric, interleaved, options, report

SEQUENCE_LENGTH = 8192


def main() -> None:
    chosen = options(__doc__)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "stdlib"
        source = Path(sysconfig.get_path("stdlib"))
        prepare([source], out, PrepareOptions(include=["*.py"], exclude=["site-packages"]), lambda done, total: None)
        corpus = Corpus(out)
        shards = [str(out / shard["name"]) for shard in corpus.manifest["shards"]]
        config = StreamConfig(shards=str(out), lanes=32)

        def ours() -> None:
            stream = ByteStream(corpus, config, SEQUENCE_LENGTH)
            batches = stream.sequences_per_epoch // 32
            with Loader(stream, LoaderConfig(threads=1), global_batch=32, micro_batch=8) as loader:
                for _ in zip(range(batches), loader, strict=False):
                    pass

        def limit() -> None:
            for sample in webdataset.WebDataset(shards, shardshuffle=False):
                zstandard.decompress(sample["bytes.zst"])

        def with_documents() -> None:
            for sample in webdataset.WebDataset(shards, shardshuffle=False):
                raw = zstandard.decompress(sample["bytes.zst"])
                for entry in json.loads(sample["json"])["documents"]:
                    raw[entry["start"] : entry["start"] + entry["length"]]

        seconds = interleaved(
            {"ours": ours, "limit": limit, "webdataset": with_documents}, rounds=3 if chosen.quick else 15
        )
        speed = {name: corpus.raw_bytes / time / 1e6 for name, time in seconds.items()}
    metrics = [
        Metric("loader", speed["ours"], "MB/s", f"rows of {SEQUENCE_LENGTH}, 1 thread, digests verified"),
        Metric("decompression alone", speed["limit"], "MB/s", "every block through webdataset and zstandard"),
        Metric("webdataset", speed["webdataset"], "MB/s", "the same, cut into documents; no order, no resume"),
        Metric("loader / decompression", speed["ours"] / speed["limit"], "", "share of the limit"),
    ]
    report("Reading a corpus once", metrics, chosen.json)


if __name__ == "__main__":
    main()
