"""Perceiver AR's copy task (arXiv:2202.07765, section 5.1): random bytes, then the same bytes in reverse order.

python benchmarks/mirrored.py [RECIPE...] [--fresh N] [--runs FOLDER]

For each recipe (by default configs/perceiver_ar/mirrored-2048.yaml) this makes the corpora, trains the model with
`byteloom train`, and prints the accuracy on the second halves of fresh rows: the share of bytes that the model predicts
first. A second start resumes the first.

A long copy is learned in several runs. In the first run only the 32 bytes before the middle are random, and all bytes
before them are zeros. The next run has 64 random bytes, and so on up to the recipe's number. Each run starts from the
weights of the previous one. A row ends with its copy. The middle keeps its position, so the next run can use what a run
has learned about the positions around it.

Without these runs, an attention over the whole row learns which bytes occur, but not at which position. In longer rows
this predicts less about the next byte, and the model learns the copy later.

The recipe's weight decay is only for the last run. Where attention looks must depend on positions alone. The influence
of bytes in the initial weights has almost no gradient, and only decay removes it. Without decay, the model looks for
one byte in thousands far from its position.
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
"""Random bytes before the middle in the first run."""
FIRST_STEPS, STEPS = 250, 100
"""Steps of the first run, and of the others before the recipe's own."""
SCORED, MOST_ROWS = 8192, 64
"""Bytes that a step scores, and the largest number of rows they may be in."""


@dataclass(frozen=True)
class Course:
    """One of the runs that lead to a recipe's copy."""

    config: Config
    overrides: Sequence[str]
    random: int
    """Random bytes before the middle."""


@dataclass(frozen=True)
class Result:
    half: int
    parameters: int
    steps: int
    scored: int
    """Bytes scored in training."""
    minutes: float
    """Minutes of all training steps."""
    right: int
    predicted: int


def main() -> None:
    chosen = arguments()
    print(table([measure(recipe, chosen) for recipe in chosen.recipes]))


def measure(recipe: Path, chosen: argparse.Namespace) -> Result:
    """Train a recipe, and let its model predict the second halves of fresh rows."""
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
    """Return the runs that lead to a recipe. The last is the recipe's own."""
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
    """Prepare a corpus with one document for each row that a run reads, from a temporary tar."""
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
    """Return (..., 2H) bytes from (..., H): the same bytes, then in reverse order."""
    return np.concatenate([half, half[..., ::-1]], -1)


def trained(run: Path, config: Config) -> PerceiverAR:
    """Return the model of a run's newest checkpoint, in the precision that `eval` would use."""
    model = build_model(config.model).eval()
    assert isinstance(model, PerceiverAR)
    parameters = [whole(fragment_name(MODEL, name), parameter) for name, parameter in model.named_parameters()]
    assert CheckpointStore(RunFolder(run).checkpoints, keep=1).load(lambda checkpoint: parameters) is not None
    return model.to(compute_dtype(scoring_precision(config.engine.precision, torch.device("cpu"))))


@torch.no_grad()
def count_right(model: PerceiverAR, row: NDArray[np.int64]) -> int:
    """Count the bytes of a row's second half that the model predicts first, N at a time."""
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
        "| random bytes | parameters | steps | bytes scored | minutes | right in fresh rows | accuracy |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        share = f"{r.right:,} of {r.predicted:,}"
        lines.append(
            f"| {r.half:,} | {r.parameters:,} | {r.steps:,} | {r.scored / 1e6:.2f} M | {r.minutes:.1f} | {share} "
            f"| {r.right / r.predicted:.4%} |"
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", type=Path, nargs="*", default=[RECIPE], metavar="RECIPE")
    parser.add_argument("--fresh", type=int, default=64, help="fresh rows to predict")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for runs and corpora")
    return parser.parse_args()


if __name__ == "__main__":
    main()
