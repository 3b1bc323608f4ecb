"""Perceiver AR's copy task (arXiv:2202.07765, section 5.1): random bytes, then the same backwards.

python benchmarks/mirrored.py [RECIPE...] [--fresh N] [--runs FOLDER]

For each recipe (configs/perceiver_ar/mirrored-2048.yaml if none is named) this makes the corpora it reads, trains it by
`byteloom train`, and prints how much of the second halves of fresh rows it gets right: the share of bytes that are the
model's first choice. A start after the first goes on where the last one was.

A long copy is learned in several runs. In the first only the 32 bytes before the middle are random, and zeros are all
before them; then 64, and so on up to the recipe's own, each run from the weights of the one before. A row ends where
its copy does. The middle stays where it is, so what a run has learned of the places around it holds in the next.

Without that, an attention that looks everywhere knows what occurs in a row and not where; the longer the rows, the less
that tells of the next byte, and the later anything else is learned.

The recipe's weight decay is for its own run. Where to look must depend on places alone; what first values add of bytes
has next to no gradient, and only decay takes it away. It shows in one byte of thousands, looked for far from its place.
"""

import argparse
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.checkpoint import CheckpointStore
from pretrain.config.loading import load
from pretrain.config.schema import Config
from pretrain.distributed.fragments import MODEL, fragment_name, whole
from pretrain.engines import compute_dtype, scoring_precision
from pretrain.models import build_model
from pretrain.models.families.perceiver_ar import PerceiverAR
from pretrain.training.run_folder import RunFolder

RECIPE = Path(__file__).parents[1] / "configs/perceiver_ar/mirrored-2048.yaml"
SEED, FRESH_SEED = 0, 1
SHORTEST = 32
"""Random bytes before the middle in the first of several runs."""
FIRST_STEPS, STEPS = 250, 100
"""Of the first, and of the others up to the recipe's own."""
SCORED, MOST_ROWS = 8192, 64
"""Bytes that a step scores, in at most so many rows."""


@dataclass(frozen=True)
class Course:
    """A run on the way to a recipe's copy."""

    config: Config
    overrides: Sequence[str]
    random: int
    """Bytes before the middle."""


@dataclass(frozen=True)
class Result:
    half: int
    parameters: int
    steps: int
    scored: int
    """Bytes, in training."""
    minutes: float
    """Of training steps."""
    right: int
    asked: int


def main() -> None:
    chosen = arguments()
    print(table([measured(recipe, chosen) for recipe in chosen.recipes]))


def measured(recipe: Path, chosen: argparse.Namespace) -> Result:
    """Trains a recipe, and asks its model for the second halves of fresh rows."""
    half = load(recipe).model.sequence_length // 2
    courses = courses_of(recipe, half, chosen.runs)
    for course in courses:
        corpus = Path(course.config.data.shards)
        if not corpus.exists():
            make_corpus(corpus, half, course)
        byteloom("train", recipe, *course.overrides)
    runs = [chosen.runs / course.config.run.name for course in courses]
    model = trained(runs[-1], courses[-1].config)
    rows = mirrored(np.random.default_rng(FRESH_SEED).integers(256, size=(chosen.fresh, half)))
    right = sum(count_right(model, row) for row in rows)
    records = [json.loads(line) for run in runs for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(record.get("step_seconds", 0.0) for record in records)
    steps = [course.config.train.steps for course in courses]
    scored = sum(
        count * course.config.train.global_batch * course.config.model.latents
        for count, course in zip(steps, courses, strict=True)
    )
    return Result(half, model.parameter_count(), sum(steps), scored, seconds / 60, right, chosen.fresh * half)


def courses_of(recipe: Path, half: int, root: Path) -> list[Course]:
    """The runs that lead to a recipe, and its own last."""
    lengths = [half]
    while lengths[0] > SHORTEST:
        lengths.insert(0, lengths[0] // 2)
    name, courses = load(recipe).run.name, []
    for random in lengths:
        overrides = [f"run.root={root}"]
        if courses:
            overrides += [f"initialize.weights={root / courses[-1].config.run.name}", "initialize.partly=true"]
        if random < half:
            rows = min(MOST_ROWS, max(1, SCORED // random))
            overrides += [
                f"run.name={name}-from-{random}",
                f"model.sequence_length={half + random}",
                f"model.latents={random}",
                f"model.minimum_crop={half + random}",
                f"train.steps={STEPS if courses else FIRST_STEPS}",
                f"train.global_batch={rows}",
                f"train.micro_batch={rows}",
                "optimizer.weight_decay=0.0",
            ]
        corpus = root / "corpora" / load(recipe, overrides).run.name
        overrides.append(f"data.shards={corpus}")
        courses.append(Course(load(recipe, overrides), overrides, random))
    return courses


def make_corpus(corpus: Path, half: int, course: Course) -> None:
    """A document for each row that a run reads, by way of a tar that `byteloom prepare` reads."""
    source = corpus.with_suffix(".tar")
    source.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(SEED)
    with tarfile.open(source, "w") as tar:
        for number in range(course.config.train.steps * course.config.train.global_batch):
            before = np.zeros(half - course.random, np.int64)
            copied = mirrored(generator.integers(256, size=course.random))
            row = np.concatenate([before, copied]).astype(np.uint8).tobytes()
            member = tarfile.TarInfo(f"{number:07}.bin")
            member.size = len(row)
            tar.addfile(member, io.BytesIO(row))
    byteloom("prepare", source, "--out", corpus)
    source.unlink()


def mirrored(half: NDArray[np.int64]) -> NDArray[np.int64]:
    """(..., H) bytes to (..., 2H): the same, and then backwards."""
    return np.concatenate([half, half[..., ::-1]], -1)


def trained(run: Path, config: Config) -> PerceiverAR:
    """Return the model of a run's newest checkpoint, in the precision that `eval` would take."""
    model = build_model(config.model).eval()
    assert isinstance(model, PerceiverAR)
    parameters = [whole(fragment_name(MODEL, name), parameter) for name, parameter in model.named_parameters()]
    assert CheckpointStore(RunFolder(run).checkpoints, keep=1).load(lambda checkpoint: parameters) is not None
    return model.to(compute_dtype(scoring_precision(config.engine.precision, torch.device("cpu"))))


@torch.no_grad()
def count_right(model: PerceiverAR, row: NDArray[np.int64]) -> int:
    """Bytes of a row's second half that are the model's first choice, N at a time."""
    ids, right = torch.from_numpy(row)[None], 0
    length, half = len(row), len(row) // 2
    for first in range(half, length, model.latents):
        end = min(first + model.latents, length)
        places = model.place_latents(torch.tensor([end]), length)
        guesses = model.logits(model.read(ids, places)).argmax(-1)
        right += int(((guesses == ids.gather(1, places)) & (places >= first)).sum())
    return right


def byteloom(*arguments: object) -> None:
    subprocess.run([Path(sys.executable).parent / "byteloom", *map(str, arguments)], check=True)


def table(results: list[Result]) -> str:
    lines = [
        "| random bytes | parameters | steps | bytes scored | minutes | right, of fresh rows | accuracy |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        share = f"{r.right:,} of {r.asked:,}"
        lines.append(
            f"| {r.half:,} | {r.parameters:,} | {r.steps:,} | {r.scored / 1e6:.2f} M | {r.minutes:.1f} | {share} "
            f"| {r.right / r.asked:.4%} |"
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", type=Path, nargs="*", default=[RECIPE], metavar="RECIPE")
    parser.add_argument("--fresh", type=int, default=64, help="rows that are asked")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs and corpora are written")
    return parser.parse_args()


if __name__ == "__main__":
    main()
