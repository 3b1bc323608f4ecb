"""Kills ranks of training runs, and looks whether each run goes on as if nothing had happened.

    python -m tests.faults --rounds 200

A round is a small run whose ranks are real processes that call the train entry. SIGKILL ends one of them or all, at a
named point of a save, a deletion or a load, or at any moment. What is left on disk is verified, and the run is started
again, in one round of four under another engine or on another number of ranks. It is to go on from its last
checkpoint, and to end with the losses of a run that nothing happened to. A round is a function of the seed and its
number: `--seed S --first R --rounds 1` is round R again.
"""

import argparse
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from pretrain.checkpoint import CheckpointStore, store, verify
from pretrain.checkpoint.folder import PAGE_BYTES
from pretrain.training.run_folder import RunFolder
from tests.conftest import STDLIB, prepare_corpus, recipe_tree
from tests.distributed.parity import content, newest
from tests.distributed.starts import Start

STEPS, EVERY, KEEP = 12, 3, 1
"""Of a run. With one checkpoint kept, every save but the first deletes one."""
SAVES = STEPS // EVERY
EXACT = ("train/bits_per_byte", "gradient_norm", "learning_rate", "epoch")


@dataclass(frozen=True)
class Way:
    """How a run trains."""

    engine: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.engine} of {self.ranks}"


WAYS = (
    *(Way(*way) for way in itertools.product(("ddp", "fsdp", "zero1", "zero2", "zero3"), (2, 3))),
    Way("hsdp", 4),
)


Do = Callable[[], None]


def before_staging(do: Do) -> None:
    """Has something done each time that a save is about to copy what it will write."""
    inner = CheckpointStore._stage

    def watched(*arguments: Any) -> Any:
        do()
        return inner(*arguments)

    CheckpointStore._stage = watched


def during_staging(do: Do) -> None:
    """Has something done when a save has copied half of the tensors."""
    stage, copy = CheckpointStore._stage, store.copy
    stages: list[bool] = []

    def watched_stage(*arguments: Any) -> Any:
        stages.append(True)
        try:
            return stage(*arguments)
        finally:
            stages.clear()

    def watched_copy(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        half = len(targets) // 2 if stages else 0
        copy(targets[:half], sources[:half])
        if stages:
            do()
        copy(targets[half:], sources[half:])

    CheckpointStore._stage, store.copy = watched_stage, watched_copy


class Halfway:
    """A file that has something done when half of each piece is written."""

    def __init__(self, file: Any, do: Do) -> None:
        self._file, self._do = file, do

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Any:
        self._file.__enter__()
        return self

    def __exit__(self, *raised: Any) -> Any:
        return self._file.__exit__(*raised)

    def write(self, piece: memoryview) -> int:
        half = len(piece) // 2 // PAGE_BYTES * PAGE_BYTES
        written = self._file.write(piece[:half])
        self._do()
        return int(written + self._file.write(piece[written:]))


def mid_file(do: Do) -> None:
    """Has something done when half of what is written to a rank's file at once is there."""
    inner = Path.open

    def opened(self: Path, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        file = inner(self, mode, *arguments, **named)
        return Halfway(file, do) if self.suffix == ".bin" and "r" not in mode else file

    Path.open = opened


def before_event(name: str, *patterns: str) -> Callable[[Do], None]:
    """Has something done before Python asks for something of the operating system, told by its audit event."""

    def watch(do: Do) -> None:
        def hook(happens: str, arguments: tuple[Any, ...]) -> None:
            if happens == name and all(re.search(p, str(a)) for p, a in zip(patterns, arguments, strict=False)):
                do()

        sys.addaudithook(hook)

    return watch


before_rename = before_event("os.rename", r"\.partial$", r"/step-\d+$")


def after_rename(do: Do) -> None:
    """Has something done when a checkpoint has got its name, and the folder that it is in is not yet on disk."""
    renamed: list[bool] = []

    def look() -> None:
        if renamed:
            renamed.clear()
            do()

    before_rename(lambda: renamed.append(True))
    before_event("open", r"/checkpoints$")(look)


@dataclass(frozen=True)
class Point:
    """Where a rank can be killed."""

    watch: Callable[[Do], None]
    """Has something done each time that the rank is there."""
    times: int
    """How often every run is there, at least."""
    first_rank_alone: bool = False


DURING_LOAD, ANY_MOMENT = "during load", "at any moment"
POINTS = {
    "before staging": Point(before_staging, SAVES),
    "during staging": Point(during_staging, SAVES),
    "mid-file": Point(mid_file, SAVES),
    "before rename": Point(before_rename, SAVES, first_rank_alone=True),
    "after rename": Point(after_rename, SAVES, first_rank_alone=True),
    "during deletion": Point(
        before_event("os.remove", r"^(rank-\d+\.bin|\w+\.json)$"), 3 * (SAVES - KEEP), first_rank_alone=True
    ),
    DURING_LOAD: Point(before_event("open", r"/step-\d+/"), 3),
}
KINDS = (*POINTS, ANY_MOMENT)
GRACES = (0.0, 0.1, 1.0)
"""Seconds that are left to the other ranks when one was killed: to fail by themselves, or to get not that far."""


@dataclass(frozen=True)
class Trap:
    """Kills a rank, and maybe the others with it, when it comes to a point for the n-th time."""

    point: str
    rank: int
    number: int
    kills_all: bool

    def __str__(self) -> str:
        victims = "all" if self.kills_all else "one"
        return f"{victims} {self.point} (rank {self.rank}, number {self.number})"

    def __call__(self, rank: int, pids: Sequence[int]) -> None:
        if rank != self.rank:
            return
        left = itertools.count(self.number - 1, -1)

        def snap() -> None:
            if next(left) == 0:
                others = [pid for pid in pids if pid != os.getpid()] if self.kills_all else []
                for pid in (*others, os.getpid()):
                    os.kill(pid, signal.SIGKILL)

        POINTS[self.point].watch(snap)


@dataclass(frozen=True)
class Outcome:
    """What a finished run came to."""

    numbers: list[tuple[int, dict[str, float]]]
    """By step."""
    reading: dict[str, Any]
    tensors: dict[str, bytes]

    @property
    def losses(self) -> list[float]:
        return [numbers["train/bits_per_byte"] for _, numbers in self.numbers]


class Stand:
    """A folder in which runs of one small model are trained, killed and compared."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self.folder = folder
        self._corpus = corpus
        self._references: dict[Way, tuple[Outcome, float]] = {}

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.folder / "runs" / name)

    def recipe(self, way: Way, name: str) -> Path:
        tree: Any = recipe_tree(self._corpus)
        tree["run"] |= {"root": str(self.folder / "runs"), "name": name}
        tree["model"] = {"family": "transformer_xl", "sequence_length": 64, "width": 32, "layers": 2, "heads": 2}
        tree["model"] |= {"memory_length": 16, "dropout": 0.1}
        tree["data"]["shards"] = str(self._corpus)
        tree["data"]["lanes"] = tree["train"]["global_batch"]
        tree["train"] |= {"steps": STEPS, "micro_batch": 2}
        tree["validation"] = {"shards": None}
        tree["engine"] |= {"name": way.engine, "shards": 2 if way.engine == "hsdp" else None}
        tree["checkpoint"] = {"every": EVERY, "keep": KEEP}
        path = self.folder / f"{name}-{way.engine}-{way.ranks}.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return path

    def start(self, way: Way, name: str, prepare: Callable[[int, Sequence[int]], None] | None = None) -> Start:
        said = self.folder / "said" / name / f"{time.monotonic_ns()}"
        return Start(self.recipe(way, name), way.ranks, said, prepare)

    def reference(self, way: Way) -> tuple[Outcome, float]:
        """The run that nothing happened to, and the seconds that it took."""
        if way not in self._references:
            begin = time.monotonic()
            name = f"reference-{way.engine}-{way.ranks}"
            start = self.start(way, name)
            assert not any(start.finish()), start.said
            self._references[way] = self.outcome(name), time.monotonic() - begin
        return self._references[way]

    def outcome(self, name: str) -> Outcome:
        run = self.run(name)
        records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
        last = newest(run.checkpoints)
        return Outcome(
            [(record["step"], {key: record[key] for key in EXACT}) for record in records],
            verify(last).state["reading"],
            content(last),
        )

    def last_commit(self, name: str) -> int:
        """The step of the last checkpoint that a killed run has left, 0 if it has none.

        Raises:
            AssertionError: one is not valid, or one that had been committed is lost.
        """
        run = self.run(name)
        committed = CheckpointStore(run.checkpoints, keep=1).committed()
        for path in committed:
            verify(path)
        last = int(committed[-1].name.removeprefix("step-")) if committed else 0
        log = run.log_of(0).read_text() if run.log_of(0).exists() else ""
        told = [int(step) for step in re.findall(r"INFO checkpoint \S*/step-(\d+)$", log, re.MULTILINE)]
        assert last >= max(told, default=0), f"step {max(told)} had been committed, and {last} is the last"
        begun = 0 if "ERROR cannot write the checkpoint of step" in log else (self._last_step(run) - 1) // EVERY
        assert last >= EVERY * (begun - 1), f"save {begun} had begun, and step {last} is the last"
        return last

    @staticmethod
    def _last_step(run: RunFolder) -> int:
        """Of the journal, whose last line may be half a one."""
        lines = run.metrics.read_text().splitlines(keepends=True) if run.metrics.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)

    def goes_on(self, way: Way, name: str, reference: Outcome, *, bit_for_bit: bool) -> int:
        """Starts a killed run again, and compares what it comes to; returns the step it went on from.

        Raises:
            AssertionError: it does not go on from its last checkpoint, or comes to something else.
        """
        last_commit = self.last_commit(name)
        start = self.start(way, name)
        codes = start.finish()
        assert not any(codes), start.said
        went_on = re.findall(r"resumes after step (\d+)", start.said)
        assert list(map(int, went_on)) == [last_commit][: last_commit > 0], start.said
        assert "not valid" not in start.said, start.said
        outcome = self.outcome(name)
        assert [step for step, _ in outcome.numbers] == list(range(1, STEPS + 1))
        assert outcome.reading == reference.reading
        for own, expected in zip(outcome.losses, reference.losses, strict=True):
            assert abs(own - expected) <= 1e-5 * expected, (outcome.losses, reference.losses)
        if bit_for_bit:
            assert outcome == reference, (outcome.numbers, reference.numbers)
        left = sorted(path.name for path in self.run(name).checkpoints.iterdir())
        if last_commit == STEPS:  # then nothing was saved any more, after which the one before would have gone
            left = left[-KEEP:]
        assert left == [f"step-{STEPS:08d}"], left
        return last_commit

    def kill(self, way: Way, name: str, trap: Trap, grace: float) -> None:
        """A start that a trap ends."""
        start = self.start(way, name, trap)
        assert -signal.SIGKILL in start.finish(grace), f"nobody came {trap}: {start.said}"

    def kill_some_time(self, way: Way, name: str, draw: random.Random, seconds: float) -> str:
        """A start that is killed within so many seconds; says how."""
        start = self.start(way, name)
        moment = draw.uniform(0, seconds)
        start.wait(moment)
        victims = draw.choice([start.processes, [draw.choice(start.processes)]])
        for process in victims:
            process.kill()
        start.finish(draw.choice(GRACES))
        return f"{'all' if len(victims) > 1 else 'one'} after {moment:.2f} s"

    def play(self, seed: int, number: int, ways: Sequence[Way] = WAYS) -> str:
        """A round; says what happened.

        Raises:
            AssertionError: the run did not go on as it should.
        """
        draw = random.Random(f"{seed} {number}")
        kind, name = KINDS[number % len(KINDS)], f"round-{number}"
        way = draw.choice(ways)
        then = draw.choice([other for other in ways if other != way]) if draw.random() < 0.25 else way
        reference, seconds = self.reference(way)
        if kind == ANY_MOMENT:
            told = self.kill_some_time(way, name, draw, seconds)
        else:
            if kind == DURING_LOAD:
                self.kill(way, name, drawn_trap("after rename", way.ranks, draw), draw.choice(GRACES))
            killed = then if kind == DURING_LOAD else way
            trap = drawn_trap(kind, killed.ranks, draw)
            self.kill(killed, name, trap, draw.choice(GRACES))
            told = str(trap)
        went_on_from = self.goes_on(then, name, reference, bit_for_bit=then == way)
        shutil.rmtree(self.run(name).path)
        return f"{way}, killed {told}; {then} went on from step {went_on_from}"


def drawn_trap(point: str, ranks: int, draw: random.Random) -> Trap:
    rank = 0 if POINTS[point].first_rank_alone else draw.randrange(ranks)
    return Trap(point, rank, draw.randint(1, POINTS[point].times), kills_all=draw.random() < 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description="Kills training runs, and looks whether they go on.")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    print(f"seed {arguments.seed}, in {folder}", flush=True)
    prepare_corpus([STDLIB / "json", STDLIB / "email"], folder / "corpus", include=["*.py"])
    stand = Stand(folder, folder / "corpus")
    begin = time.monotonic()
    for number in range(arguments.first, arguments.first + arguments.rounds):
        try:
            told = stand.play(arguments.seed, number)
        except AssertionError:
            print(f"round {number} failed: python -m tests.faults --seed {arguments.seed} --first {number} --rounds 1")
            raise
        print(f"{time.monotonic() - begin:6.0f} s  {number}  {told}", flush=True)
    print(f"{arguments.rounds} rounds: every run went on from its last checkpoint, with the losses of its reference")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
