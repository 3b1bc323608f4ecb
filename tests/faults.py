"""Kill ranks of training runs, and check that each run resumes as if nothing had happened.

    python -m tests.faults --rounds 200

A round is a small run whose ranks are real processes that call the train entry. SIGKILL ends one rank or all, at a
named point of a save, a deletion or a load, or at a random moment. In other rounds, a copy of a checkpoint or a link to
it gets the name of a later step, a moment becomes infinite before a save and the run rewinds, or a batch has no finite
gradient and is skipped. The files on disk are verified, and the run is started again; one round in four changes the
engine or the number of ranks. The run must resume from its last checkpoint and end with the losses of an undisturbed
run. A round is a function of the seed and its number: `--seed S --first R --rounds 1` repeats round R.
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

from byteloom.core.storage.step_folders import is_step_name
from data_pipeline.stream.loader import MicroBatch
from pretrain.checkpoint import CheckpointStore, store, verify
from pretrain.checkpoint.homes.folder import PAGE_BYTES
from pretrain.checkpoint.loading import Share
from pretrain.distributed.fragments import Fragment
from pretrain.engines.base import BaseEngine
from pretrain.training.health import HealthLog
from pretrain.training.run_folder import RunFolder
from tests.conftest import STDLIB, prepare_corpus, recipe_tree
from tests.distributed.parity import content, newest
from tests.distributed.starts import Start
from tests.health_runs import event_of

STEPS, EVERY, KEEP, BATCH = 12, 3, 1, 6
"""Steps, checkpoint interval, kept checkpoints and sequences of a step. Every save but the first deletes one."""
SAVES = STEPS // EVERY
EXACT = ("train/bits_per_byte", "gradient_norm", "learning_rate", "epoch")


@dataclass(frozen=True)
class Setup:
    """Engine and number of ranks of a run."""

    engine: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.engine} of {self.ranks}"


SETUPS = (
    *(Setup(*each) for each in itertools.product(("ddp", "fsdp", "zero1", "zero2", "zero3"), (2, 3))),
    Setup("hsdp", 4),
)


Action = Callable[[], None]


def before_staging(action: Action) -> None:
    """Call an action before each save copies its tensors."""
    inner = CheckpointStore._stage

    def watched(*arguments: Any) -> Any:
        action()
        return inner(*arguments)

    CheckpointStore._stage = watched


def during_staging(action: Action) -> None:
    """Call an action when a save has copied half of the tensors."""
    stage, copy = CheckpointStore._stage, store.copy_and_look
    stages: list[bool] = []

    def watched_stage(*arguments: Any) -> Any:
        stages.append(True)
        try:
            return stage(*arguments)
        finally:
            stages.clear()

    def watched_copy(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> list[int]:
        half = len(targets) // 2 if stages else 0
        found = copy(targets[:half], sources[:half])
        if stages:
            action()
        return found + [half + number for number in copy(targets[half:], sources[half:])]

    CheckpointStore._stage, store.copy_and_look = watched_stage, watched_copy


def during_load(action: Action) -> None:
    """Call an action before a rank reads its share of a checkpoint, which may be empty, and before it fills tensors."""
    read, fill = Share.__init__, Share.fill

    def watched_read(*arguments: Any) -> None:
        action()
        read(*arguments)

    def watched_fill(share: Share) -> None:
        action()
        fill(share)

    Share.__init__, Share.fill = watched_read, watched_fill


class HalfwayFile:
    """File that calls an action when half of each piece is written."""

    def __init__(self, file: Any, action: Action) -> None:
        self._file, self._do = file, action

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


def mid_file(action: Action) -> None:
    """Call an action when half of a write to a rank's file is done."""
    inner = Path.open

    def opened(self: Path, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        file = inner(self, mode, *arguments, **named)
        return HalfwayFile(file, action) if self.suffix == ".bin" and "r" not in mode else file

    Path.open = opened


def before_event(name: str, *patterns: str) -> Callable[[Action], None]:
    """Return a function that calls an action before each audit event with this name and these arguments."""

    def watch(action: Action) -> None:
        def hook(happens: str, arguments: tuple[Any, ...]) -> None:
            if happens == name and all(re.search(p, str(a)) for p, a in zip(patterns, arguments, strict=False)):
                action()

        sys.addaudithook(hook)

    return watch


before_rename = before_event("os.rename", r"\.partial$", r"/step-\d+$")


def after_rename(action: Action) -> None:
    """Call an action when a checkpoint has its final name and its parent folder is not yet synced to disk."""
    renamed: list[bool] = []

    def look() -> None:
        if renamed:
            renamed.clear()
            action()

    before_rename(lambda: renamed.append(True))
    before_event("open", r"/checkpoints$")(look)


@dataclass(frozen=True)
class Point:
    """Point of a run at which a rank can be killed."""

    watch: Callable[[Action], None]
    """Function that calls an action each time the rank reaches the point."""
    times: int
    """Minimum number of times that every run reaches the point."""
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
    DURING_LOAD: Point(during_load, 2),
}
COPIED, LINKED = "copied checkpoint", "linked checkpoint"
NOT_FINITE, BAD_BATCH = "infinite moment", "bad batch"
PLANTS: dict[str, Callable[[Path, Path], object]] = {
    COPIED: shutil.copytree,
    LINKED: lambda source, target: target.symlink_to(source, target_is_directory=True),
}
"""Functions that give a checkpoint the name of a later step."""
KINDS = (*POINTS, ANY_MOMENT, *PLANTS, NOT_FINITE, BAD_BATCH)
GRACES = (0.0, 0.1, 1.0)
"""Seconds between the death of one rank and the end of the others, which may fail by themselves first."""


@dataclass(frozen=True)
class Trap:
    """Kill of a rank, and maybe of the others, when it reaches a point for the n-th time."""

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
        remaining = itertools.count(self.number - 1, -1)

        def snap() -> None:
            if next(remaining) == 0:
                other_ranks = [pid for pid in pids if pid != os.getpid()] if self.kills_all else []
                for pid in (*other_ranks, os.getpid()):
                    os.kill(pid, signal.SIGKILL)

        POINTS[self.point].watch(snap)


@dataclass(frozen=True)
class Poison:
    """Fault that makes a moment of a rank infinite before its n-th save."""

    rank: int
    number: int

    def __call__(self, rank: int, pids: Sequence[int]) -> None:
        if rank != self.rank:
            return
        remaining, inner = itertools.count(self.number - 1, -1), CheckpointStore._stage

        def poisoned(self: CheckpointStore, fragments: Sequence[Fragment]) -> Any:
            if next(remaining) == 0:
                next(f for f in fragments if f.name.startswith("exp_avg_sq/") and len(f.data)).data[0] = torch.inf
            return inner(self, fragments)

        CheckpointStore._stage = poisoned


@dataclass(frozen=True)
class BadBatch:
    """Fault that makes the gradient of a batch NaN on the rank that reads its first row."""

    first_sequence: int

    def __call__(self, rank: int, pids: Sequence[int]) -> None:
        seed_of, backward, is_bad = BaseEngine._seed_of, BaseEngine._backward_watched, [False]

        def look(self_: BaseEngine, micro_batch: MicroBatch, step: int) -> int:
            is_bad[0] = micro_batch.first_sequence == self.first_sequence
            return seed_of(self_, micro_batch, step)

        def spoiled(self_: BaseEngine, loss: torch.Tensor) -> None:
            backward(self_, loss * torch.nan if is_bad[0] else loss)
            is_bad[0] = False

        BaseEngine._seed_of, BaseEngine._backward_watched = look, spoiled


@dataclass(frozen=True)
class Outcome:
    """Result of a finished run."""

    numbers: list[tuple[int, dict[str, float]]]
    """Metrics by step."""
    reading: dict[str, Any]
    tensors: dict[str, bytes]

    @property
    def losses(self) -> list[float]:
        return [numbers["train/bits_per_byte"] for _, numbers in self.numbers]


class FaultHarness:
    """Folder in which runs of one small model are trained, killed and compared."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self.folder = folder
        self._corpus = corpus
        self._references: dict[tuple[Setup, int | None], tuple[Outcome, float]] = {}

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.folder / "runs" / name)

    def recipe(self, setup: Setup, name: str) -> Path:
        tree: Any = recipe_tree(self._corpus)
        tree["run"] |= {"root": str(self.folder / "runs"), "name": name}
        tree["model"] = {"family": "transformer_xl", "sequence_length": 64, "width": 32, "layers": 2, "heads": 2}
        tree["model"] |= {"memory_length": 16, "dropout": 0.1}
        tree["data"]["shards"] = str(self._corpus)
        tree["data"]["lanes"] = tree["train"]["global_batch"]
        tree["train"] |= {"steps": STEPS, "global_batch": BATCH, "micro_batch": 2}
        tree["validation"] = {"shards": None}
        tree["engine"] |= {"name": setup.engine, "shards": 2 if setup.engine == "hsdp" else None}
        tree["checkpoint"] = {"every": EVERY, "keep": KEEP}
        path = self.folder / f"{name}-{setup.engine}-{setup.ranks}.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return path

    def start(self, setup: Setup, name: str, prepare: Callable[[int, Sequence[int]], None] | None = None) -> Start:
        output = self.folder / "output" / name / f"{time.monotonic_ns()}"
        return Start(self.recipe(setup, name), setup.ranks, output, prepare)

    def reference(self, setup: Setup, skipped: int | None = None) -> tuple[Outcome, float]:
        """Return the result of the undisturbed run, and the seconds it took.

        Args:
            setup: of the run.
            skipped: first sequence of a batch that the run skips from its beginning; None skips nothing.
        """
        if (setup, skipped) not in self._references:
            begin = time.monotonic()
            name = f"reference-{setup.engine}-{setup.ranks}-{skipped}"
            if skipped is not None:
                self.run(name).path.mkdir(parents=True)
                event = event_of(action="rewind", sequences=[(skipped, BATCH)], to_step=0)
                HealthLog(self.run(name).health).append(event)
            start = self.start(setup, name)
            assert not any(start.finish()), start.output
            self._references[setup, skipped] = self.outcome(name), time.monotonic() - begin
        return self._references[setup, skipped]

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
        """Return the step of the last checkpoint of a killed run, 0 if there is none.

        Raises:
            AssertionError: a checkpoint is not valid, or a committed one is lost.
        """
        run = self.run(name)
        committed = CheckpointStore(run.checkpoints, keep=1).committed()
        for path in committed:
            verify(path)
        last = int(committed[-1].name.removeprefix("step-")) if committed else 0
        log = run.log_of(0).read_text() if run.log_of(0).exists() else ""
        logged = [int(step) for step in re.findall(r"INFO checkpoint \S*/step-(\d+)$", log, re.MULTILINE)]
        assert last >= max(logged, default=0), f"step {max(logged)} was committed, but {last} is the last checkpoint"
        started = 0 if "ERROR cannot write the checkpoint of step" in log else (self._last_step(run) - 1) // EVERY
        assert last >= EVERY * (started - 1), f"save {started} had started, but step {last} is the last checkpoint"
        return last

    @staticmethod
    def _last_step(run: RunFolder) -> int:
        """Return the last step in the journal, whose last line may be incomplete."""
        lines = run.metrics.read_text().splitlines(keepends=True) if run.metrics.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)

    def resume_and_compare(
        self, setup: Setup, name: str, reference: Outcome, *, bit_for_bit: bool, plant: str | None = None
    ) -> int:
        """Start a killed run again, compare its result with the reference, and return the step it resumed after.

        `plant` names the function that first gives its last checkpoint the name of a later step.

        Raises:
            AssertionError: the run did not resume from its last checkpoint, or its result differs.
        """
        last_commit = self.last_commit(name)
        if plant is not None:
            checkpoints = self.run(name).checkpoints
            planted = checkpoints / f"step-{last_commit + EVERY:08d}"
            PLANTS[plant](checkpoints / f"step-{last_commit:08d}", planted)
        start = self.start(setup, name)
        codes = start.finish()
        assert not any(codes), start.output
        resumed = re.findall(r"resumes after step (\d+)", start.output)
        assert list(map(int, resumed)) == [last_commit][: last_commit > 0], start.output
        if plant is not None:
            assert f"{planted.name} is not valid" in start.output, start.output
            assert os.path.lexists(planted.with_suffix(".invalid"))  # a link to a checkpoint that is deleted by now
        assert start.output.count("is not valid") == (0 if plant is None else setup.ranks), start.output
        outcome = self.outcome(name)
        assert [step for step, _ in outcome.numbers] == list(range(1, STEPS + 1))
        assert outcome.reading == reference.reading
        for own, expected in zip(outcome.losses, reference.losses, strict=True):
            assert abs(own - expected) <= 1e-5 * expected, (outcome.losses, reference.losses)
        if bit_for_bit:
            assert outcome == reference, (outcome.numbers, reference.numbers)
        kept = sorted(path.name for path in self.run(name).checkpoints.iterdir() if is_step_name(path.name))
        if last_commit == STEPS:  # without another save, the previous checkpoint is not deleted
            kept = kept[-KEEP:]
        assert kept == [f"step-{STEPS:08d}"], kept
        return last_commit

    def kill(self, setup: Setup, name: str, trap: Trap, grace: float) -> None:
        """Start a run and let a trap kill it."""
        start = self.start(setup, name, trap)
        assert -signal.SIGKILL in start.finish(grace), f"no rank reached {trap}: {start.output}"

    def poison(self, setup: Setup, name: str, poison: Poison) -> str:
        """Start a run whose save finds a non-finite value, so that it rewinds; return a description."""
        start = self.start(setup, name, poison)
        assert start.finish(grace=5.0) == [0] * setup.ranks, start.output
        assert re.search(r"values that are NaN or infinite in exp_avg_sq/.*; the run rewinds to ", start.output)
        found = f"step-{poison.number * EVERY:08d}.post-mortem"
        assert [path.name for path in self.run(name).checkpoints.glob("*.post-mortem")] == [found], start.output
        return f"with an infinite moment on rank {poison.rank} before save {poison.number}"

    def spoil(self, setup: Setup, name: str, bad: BadBatch) -> str:
        """Start a run that skips a bad batch, and return a description."""
        start = self.start(setup, name, bad)
        assert start.finish() == [0] * setup.ranks, start.output
        assert "the gradient is not finite" in start.output and "update skipped (1 of 10)" in start.output, start.output
        return f"with a bad batch from sequence {bad.first_sequence} on"

    def kill_at_random_moment(self, setup: Setup, name: str, draw: random.Random, seconds: float) -> str:
        """Start a run, kill it at a random moment within some seconds, and return a description."""
        start = self.start(setup, name)
        moment = draw.uniform(0, seconds)
        start.wait(moment)
        victims = draw.choice([start.processes, [draw.choice(start.processes)]])
        for process in victims:
            process.kill()
        start.finish(draw.choice(GRACES))
        return f"{'all' if len(victims) > 1 else 'one'} after {moment:.2f} s"

    def run_round(self, seed: int, number: int, setups: Sequence[Setup] = SETUPS) -> str:
        """Run a round and return a description of it.

        Raises:
            AssertionError: the run did not resume as it should.
        """
        draw = random.Random(f"{seed} {number}")
        kind, name = KINDS[number % len(KINDS)], f"round-{number}"
        setup = draw.choice(setups)
        next_setup = draw.choice([other for other in setups if other != setup]) if draw.random() < 0.25 else setup
        reference, seconds = self.reference(setup)
        if kind == ANY_MOMENT:
            description = f"killed {self.kill_at_random_moment(setup, name, draw, seconds)}"
        elif kind == BAD_BATCH:
            bad = BadBatch(BATCH * draw.randrange(STEPS))
            reference, _ = self.reference(setup, bad.first_sequence)
            description = self.spoil(setup, name, bad)
        elif kind == NOT_FINITE:
            poison = Poison(draw.randrange(setup.ranks), draw.randint(1, SAVES))
            description = self.poison(setup, name, poison)
        elif kind in PLANTS:
            self.kill(setup, name, random_trap("after rename", setup.ranks, draw), draw.choice(GRACES))
            description = f"with a {kind}"
        else:
            if kind == DURING_LOAD:
                self.kill(setup, name, random_trap("after rename", setup.ranks, draw), draw.choice(GRACES))
            killed = next_setup if kind == DURING_LOAD else setup
            trap = random_trap(kind, killed.ranks, draw)
            self.kill(killed, name, trap, draw.choice(GRACES))
            description = f"killed {trap}"
        plant = kind if kind in PLANTS else None
        step = self.resume_and_compare(next_setup, name, reference, bit_for_bit=next_setup == setup, plant=plant)
        shutil.rmtree(self.run(name).path)
        return f"{setup}, {description}; {next_setup} resumed after step {step}"


def random_trap(point: str, ranks: int, draw: random.Random) -> Trap:
    rank = 0 if POINTS[point].first_rank_alone else draw.randrange(ranks)
    return Trap(point, rank, draw.randint(1, POINTS[point].times), kills_all=draw.random() < 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill training runs, and check that they resume.")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    print(f"seed {arguments.seed}, in {folder}", flush=True)
    prepare_corpus([STDLIB / "json", STDLIB / "email"], folder / "corpus", include=["*.py"])
    harness = FaultHarness(folder, folder / "corpus")
    begin = time.monotonic()
    for number in range(arguments.first, arguments.first + arguments.rounds):
        try:
            description = harness.run_round(arguments.seed, number)
        except AssertionError:
            print(f"round {number} failed: python -m tests.faults --seed {arguments.seed} --first {number} --rounds 1")
            raise
        print(f"{time.monotonic() - begin:6.0f} s  {number}  {description}", flush=True)
    print(f"{arguments.rounds} rounds: every run resumed from its last checkpoint, with the losses of its reference")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
