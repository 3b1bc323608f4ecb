"""Masked bytes of books: a small Perceiver IO against a unigram.

python benchmarks/masked.py BOOKS [--steps N] [--runs FOLDER]

BOOKS holds the folders train and valid with text files. This prepares both, trains configs/perceiver_io/books.yaml with
`byteloom train`, and scores the hidden bytes of the valid books with `byteloom eval`. The unigram has the frequencies
of bytes in the train books, and is scored on the same hidden bytes. A second start resumes the first.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.vocabulary import SEPARATOR
from pretrain.config.loading import load
from pretrain.evaluation.objective_scores import score_objective
from pretrain.models import form_of
from pretrain.objectives import ObjectiveConfig

RECIPE = Path(__file__).parents[1] / "configs/perceiver_io/books.yaml"
ROWS = 256
"""Rows that are scored at once."""


def main() -> None:
    """Train the model, and print both losses and the margin."""
    chosen = arguments()
    corpora = chosen.runs / "corpora"
    for part in ("train", "valid"):
        if not (corpora / part).exists():
            byteloom("prepare", chosen.books / part, "--out", corpora / part)
    steps = [] if chosen.steps is None else [f"train.steps={chosen.steps}"]
    byteloom("train", RECIPE, f"run.root={chosen.runs}", f"data.shards={corpora / 'train'}", *steps)
    run = chosen.runs / load(RECIPE).run.name
    result = json.loads(byteloom("eval", run, corpora / "valid", "--json"))
    model, unigram = result["bits_per_masked_byte"], unigram_loss(corpora / "train", corpora / "valid")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    minutes = sum(record.get("step_seconds", 0.0) for record in records) / 60
    print(f"{'bits per masked byte of':32} {'valid books':>12}")
    print(f"{'unigram of the train books':32} {unigram:12.4f}")
    print(f"{'Perceiver IO':32} {model:12.4f}")
    print(f"{'margin':32} {unigram - model:12.4f}")
    print(f"{records[-1]['step']:,} steps in {minutes:.1f} minutes")


def unigram_loss(train: Path, valid: Path) -> float:
    """Return the bits per masked byte of a unigram, which adds one to the count of each byte and of the separator."""
    counts = np.ones(SEPARATOR + 1, np.int64)
    for piece in Corpus(train).pieces():
        counts[:SEPARATOR] += np.bincount(np.frombuffer(piece.content, np.uint8), minlength=SEPARATOR)
        counts[SEPARATOR] += piece.ends
    nats = torch.from_numpy(-np.log(counts / counts.sum()))

    def nats_of(ids: NDArray[np.int16], _: NDArray[np.integer] | None) -> torch.Tensor:
        return nats[torch.from_numpy(ids.astype(np.int64)).clamp(max=SEPARATOR)]  # padding is no target

    config, objective = load(RECIPE).model, ObjectiveConfig(name="masked")
    form = form_of(config, objective)
    length = config.sequence_length
    score = score_objective(
        nats_of, Corpus(valid), objective, form, ROWS, length=length, scored=lambda length: slice(0, length)
    )
    return score.bits_per_byte


def byteloom(*words: object) -> str:
    """Run a byteloom command, and return what it prints."""
    command = [Path(sys.executable).with_name("byteloom"), *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def arguments() -> argparse.Namespace:
    """Return the arguments of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path, metavar="BOOKS")
    parser.add_argument("--steps", type=int, help="training steps. Default: those of the recipe")
    parser.add_argument("--runs", type=Path, default=Path("runs/masked"), help="folder of the corpora and of the run")
    return parser.parse_args()


if __name__ == "__main__":
    main()
