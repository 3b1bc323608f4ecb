"""Perceiver AR's copy task (arXiv:2202.07765, section 5.1): random bytes, then the same backwards.

python benchmarks/mirrored.py [RECIPE...] [--rows N] [--fresh N] [--runs FOLDER]

For each recipe (configs/perceiver_ar/mirrored-512.yaml if none is named) this makes the corpus it reads, trains it by
`byteloom train`, and prints how much of the second halves of fresh rows, of bytes drawn from all 256, it gets right:
the share of bytes that are the model's first choice. A start after the first goes on where the last one was.

A training row draws its bytes from a few values, as many as 2 to 256 (log-uniform), other ones in each row. Where few
values occur, an attention that still looks everywhere tells something of the next byte, and so what it reads begins to
reach the head. With 128 random bytes this starts after half of the bytes that rows of all 256 values take.
"""

import argparse
import io
import json
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.checkpoint import CheckpointStore
from pretrain.config import Config, load
from pretrain.engines.pytorch import compute_dtype
from pretrain.fragments import whole
from pretrain.models import build_model
from pretrain.models.perceiver_ar import PerceiverAR
from pretrain.run_folder import RunFolder

RECIPE = Path(__file__).parents[1] / "configs/perceiver_ar/mirrored-512.yaml"
SEED, FRESH_SEED = 0, 1
FEWEST_VALUES = 2
"""Of a training row."""


@dataclass(frozen=True)
class Result:
    half: int
    parameters: int
    steps: int
    minutes: float
    """Of training steps."""
    right: int
    asked: int


def main() -> None:
    chosen = arguments()
    print(table([measured(recipe, chosen) for recipe in chosen.recipes]))


def measured(recipe: Path, chosen: argparse.Namespace) -> Result:
    """Trains a recipe, and asks its model for the second halves of fresh rows."""
    config = load(recipe)
    half = config.model.sequence_length // 2
    corpus, run = chosen.runs / "corpora" / config.run.name, chosen.runs / config.run.name
    if not corpus.exists():
        make_corpus(corpus, half, chosen.rows)
    byteloom("train", recipe, f"run.root={chosen.runs}", f"data.shards={corpus}")
    model = trained(run, config)
    rows = mirrored(np.random.default_rng(FRESH_SEED).integers(256, size=(chosen.fresh, half)))
    right = sum(count_right(model, row) for row in rows)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(record.get("step_seconds", 0.0) for record in records)
    return Result(half, model.parameter_count(), config.train.steps, seconds / 60, right, chosen.fresh * half)


def make_corpus(corpus: Path, half: int, count: int) -> None:
    """A document for each of `count` rows, by way of a tar that `byteloom prepare` reads."""
    source = corpus.with_suffix(".tar")
    source.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(SEED)
    with tarfile.open(source, "w") as tar:
        for number in range(count):
            row = mirrored(training_half(half, generator)).astype(np.uint8).tobytes()
            member = tarfile.TarInfo(f"{number:07}.bin")
            member.size = len(row)
            tar.addfile(member, io.BytesIO(row))
    byteloom("prepare", source, "--out", corpus)
    source.unlink()


def training_half(half: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """(half,) bytes of so few values that they tell something of each other."""
    values = round(FEWEST_VALUES * (256 / FEWEST_VALUES) ** generator.random())
    return generator.permutation(256)[generator.integers(values, size=half)]


def mirrored(half: NDArray[np.int64]) -> NDArray[np.int64]:
    """(..., H) bytes to (..., 2H): the same, and then backwards."""
    return np.concatenate([half, half[..., ::-1]], -1)


def trained(run: Path, config: Config) -> PerceiverAR:
    """The model of a run's newest checkpoint, in the precision it was trained in."""
    model = build_model(config.model).eval()
    assert isinstance(model, PerceiverAR)
    parameters = [whole(f"model/{name}", parameter) for name, parameter in model.named_parameters()]
    assert CheckpointStore(RunFolder(run).checkpoints, keep=1).load(lambda checkpoint: parameters) is not None
    return model.to(compute_dtype(config.engine.precision))


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
        "| random bytes | parameters | steps | minutes | right, of fresh rows | accuracy |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        share = f"{r.right:,} of {r.asked:,}"
        lines.append(
            f"| {r.half:,} | {r.parameters:,} | {r.steps:,} | {r.minutes:.1f} | {share} | {r.right / r.asked:.4%} |"
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", type=Path, nargs="*", default=[RECIPE], metavar="RECIPE")
    parser.add_argument("--rows", type=int, default=20_000, help="of a corpus")
    parser.add_argument("--fresh", type=int, default=64, help="rows that are asked")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs and corpora are written")
    return parser.parse_args()


if __name__ == "__main__":
    main()
