"""Preparation of a corpus compared with `zstd -3` of the same bytes, on one core and on two.

python benchmarks/prepare.py [--quick] [--rounds N] [--json PATH] [--folder FOLDER]... [--work FOLDER]

The corpus is every file of the folders, unchanged. The default folders are those of Python and its packages, with
--quick those of Python alone. A second corpus has the same bytes as JSON lines of 2,000 bytes each, to measure the cost
of a document. One process prepares each corpus, output included. `zstd -3 --single-thread` compresses the same raw
bytes in two files. Speed per core is computed from CPU seconds, so that other work on the machine matters less.

Two things limit the gain of a second worker, and both are measured in the same run. The machine: two zstd processes
with one file each are compared with one process with both files. The start: before a preparation has work for two, it
imports its libraries. This time is that of preparing one small file. The limit of the gain is
one / (start + (one - start) / gain of zstd), where one is the time of one worker.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.report import Metric, report
from data_pipeline.corpus.corpus import Corpus

PREPARE = """
import sys
from pathlib import Path
from byteloom.core.packages import long_lived_imports
with long_lived_imports():  # as the command does
    from data_pipeline.preparation.prepare import PrepareOptions, prepare
    from data_pipeline.readers import ReadOptions
    from data_pipeline.sources.listing import Selection
out, workers, shard_bytes, reader, *sources = sys.argv[1:]
selection = Selection(exclude=["site-packages"])
options = PrepareOptions(selection, ReadOptions(reader), shard_bytes=int(shard_bytes), skip_bad=True)
prepare(sources, Path(out), options, lambda done, total: None, int(workers))
"""
ZSTD = ["zstd", "-3", "--single-thread", "-q", "-c"]
TWO_ZSTD = ["sh", "-c", f'{" ".join(ZSTD)} "$0" & {" ".join(ZSTD)} "$1" & wait']
LINE_BYTES = 2_000
LINES_BYTES = 100 << 20
"""Raw bytes of the corpus of JSON lines."""


@dataclass(frozen=True)
class Cost:
    wall: float
    cpu: float
    peak: int
    """Peak bytes of memory of one process."""
    sum_peak: int
    """Peak bytes of memory of all processes together."""


def main() -> None:
    chosen = arguments()
    packages = [] if chosen.quick else [sysconfig.get_path("purelib")]
    folders = chosen.folder or [sysconfig.get_path("stdlib"), *packages]
    shard_bytes = (16 if chosen.quick else 256) << 20
    with tempfile.TemporaryDirectory(dir=chosen.work) as temporary:
        work = Path(temporary)
        halves = [work / "raw-0", work / "raw-1"]
        measure_preparation(folders, 2, work / "first", shard_bytes, keep=True)
        with Corpus(work / "first") as corpus:
            size, documents = corpus.raw_bytes, int(corpus.manifest["documents"])
            write_raw(corpus, halves)
        shutil.rmtree(work / "first")
        lines = write_lines(halves[0], work / "lines.jsonl")
        (work / "small.txt").write_text("a file of one line\n")
        prepared = {
            "start": partial(measure_preparation, [str(work / "small.txt")], 1, work / "out", shard_bytes),
            "one": partial(measure_preparation, folders, 1, work / "out", shard_bytes),
            "two": partial(measure_preparation, folders, 2, work / "out", shard_bytes),
            "lines": partial(measure_preparation, [str(work / "lines.jsonl")], 1, work / "out", shard_bytes, "jsonl"),
        }
        costs: dict[str, list[Cost]] = {"zstd": [], "two zstd": [], **{name: [] for name in prepared}}
        for _ in range(chosen.rounds or (1 if chosen.quick else 3)):
            costs["zstd"].append(measure([*ZSTD, *map(str, halves)]))
            costs["two zstd"].append(measure([*TWO_ZSTD, *map(str, halves)]))
            for name, measure_it in prepared.items():
                costs[name].append(measure_it())
    per_core = {
        name: (lines if name == "lines" else size) / statistics.median(cost.cpu for cost in runs) / 1e6
        for name, runs in costs.items()
    }
    wall = {name: statistics.median(cost.wall for cost in runs) for name, runs in costs.items()}
    ratio, of_machine = (
        statistics.median(one.wall / two.wall for one, two in zip(costs[a], costs[b], strict=True))
        for a, b in (("one", "two"), ("zstd", "two zstd"))
    )
    limit = wall["one"] / (wall["start"] + (wall["one"] - wall["start"]) / of_machine)
    of_zstd = statistics.median(z.cpu / one.cpu for z, one in zip(costs["zstd"], costs["one"], strict=True))
    peak = max(cost.peak for name in prepared for cost in costs[name])
    sum_peak = max(cost.sum_peak for cost in costs["two"])
    corpus_size = f"{size / 1e9:.2f} GB in {documents:,} files"
    metrics = [
        Metric("prepare, per core", per_core["one"], "MB/s", f"{corpus_size}, raw bytes per CPU second, 1 worker"),
        Metric("zstd -3, per core", per_core["zstd"], "MB/s", "the command, one thread, the same bytes"),
        Metric("prepare / zstd", of_zstd, "", "per core", goal=0.6),
        Metric("prepare, 2 workers", size / wall["two"] / 1e6, "MB/s", "wall-clock"),
        Metric("2 workers / 1", ratio, "", "wall-clock", goal=1.8),
        Metric("zstd: 2 / 1", of_machine, "", "wall-clock, half of the bytes each: the limit of the machine"),
        Metric("start", wall["start"], "s", "wall-clock of preparing one small file", better="lower"),
        Metric("limit of 2 workers / 1", limit, "", "by the two above"),
        Metric("scaling / its limit", ratio / limit, "", "2 workers / 1, of the limit", goal=0.95),
        Metric("small documents, per core", per_core["lines"], "MB/s", f"JSON lines of {LINE_BYTES:,} bytes, 1 worker"),
        Metric("peak memory of a process", peak / 1e6, "MB", "the largest process", goal=600, better="lower"),
        Metric("peak memory of all", sum_peak / 1e6, "MB", "parent and 2 workers", goal=600, better="lower"),
    ]
    report("Preparing a corpus", metrics, chosen.json)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="end within a minute, with fewer rounds and files")
    parser.add_argument("--rounds", type=int, help="number of measurements, instead of 1 or 3")
    parser.add_argument("--json", type=Path, help="write the metrics here as well")
    parser.add_argument(
        "--folder", action="append", help="folder to prepare instead of Python's libraries (repeatable)"
    )
    parser.add_argument("--work", type=Path, help="folder to write in, with space for twice the corpus")
    return parser.parse_args()


def write_raw(corpus: Corpus, halves: list[Path]) -> None:
    """Write the bytes of all blocks to two files, half of the blocks to each."""
    for number, path in enumerate(halves):
        with path.open("wb") as file:
            for block in range(len(corpus) * number // 2, len(corpus) * (number + 1) // 2):
                file.write(corpus.read_content(block)[0])


def write_lines(raw: Path, path: Path) -> int:
    """Write JSON lines of real text, and return the raw bytes of their documents."""
    written = 0
    with raw.open("rb") as file, path.open("w", encoding="utf-8") as lines:
        while written < LINES_BYTES and (piece := file.read(LINE_BYTES)):
            text = piece.decode("utf-8", "ignore")
            written += lines.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return written


def measure_preparation(
    sources: list[str], workers: int, out: Path, shard_bytes: int, reader: str = "files", keep: bool = False
) -> Cost:
    cost = measure([sys.executable, "-c", PREPARE, str(out), str(workers), str(shard_bytes), reader, *sources])
    if not keep:
        shutil.rmtree(out)
    return cost


def measure(command: list[str]) -> Cost:
    """Run a command and return its cost, including that of the processes it starts."""
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path})
    with watched(process.pid) as peaks:
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} ended with {process.returncode}")
    wall = time.perf_counter() - begin
    return Cost(wall, usage.ru_utime + usage.ru_stime, *peaks)


@contextmanager
def watched(process: int) -> Iterator[list[int]]:
    """Sample every 50 ms the memory of a process and its children: the peak of the largest one, and of their sum.

    (ru_maxrss would count this process's own memory if that is larger.)
    """
    peaks, is_finished = [0, 0], threading.Event()

    def watch() -> None:
        while not is_finished.wait(0.05):
            sizes = [resident(member) for member in (process, *children_of(process))]
            peaks[:] = max(peaks[0], *sizes), max(peaks[1], sum(sizes))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        is_finished.set()
        thread.join()


def children_of(process: int) -> list[int]:
    try:
        lines = [path.read_text() for path in Path(f"/proc/{process}/task").glob("*/children")]
    except OSError:
        return []
    return [int(child) for line in lines for child in line.split()]


def resident(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


if __name__ == "__main__":
    main()
