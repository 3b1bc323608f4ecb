"""Fine-tuning of a pretrained byte model on few pairs, against training from scratch with as many steps.

python benchmarks/finetuning.py BOOKS [--runs FOLDER]

The task is to restore the capitals and the punctuation of an English sentence: the source is the sentence in small
letters without punctuation, the target is the sentence. BOOKS has the folders `train` and `valid` of books. This
pretrains configs/transformer/restore-base.yaml on BOOKS/train, makes pairs of sentences of both folders, trains
configs/transformer/restore.yaml in three ways, and prints the bits per target byte on the pairs of BOOKS/valid. Authors
of valid books are not among those of train books. A second start resumes what is unfinished.
"""

import argparse
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from pretrain.config.loading import load
from pretrain.estimate.activations import on_meta

RECIPES = Path(__file__).parents[1] / "configs/transformer"
PAIRS = {"train": 1500, "valid": 300}
"""Pairs of each folder of books."""
LETTERS = range(30, 81)
"""Bytes of a sentence; a row of 192 ids then holds it twice."""
ADAPTERS = ("finetune.freeze=['*']", "finetune.adapters.layers=['*.attention', '*.feed_forward']")
WAYS: dict[str, tuple[str, ...]] = {
    "whole": (),
    "adapters": (*ADAPTERS, "optimizer.learning_rate=5e-3"),
    "scratch": ("initialize.weights=null",),
}
"""Overrides of the recipe in each way. Adapters have few parameters, and take a higher rate."""


def main() -> None:
    """Pretrain, tune in each way, and print a table."""
    chosen = arguments()
    base = chosen.runs / "base"
    corpora = prepared(chosen.books, chosen.runs / "corpora")
    command("train", RECIPES / "restore-base.yaml", *named(base), f"data.shards={corpora['books']}")
    for way, overrides in WAYS.items():
        places = (f"data.shards={corpora['train']}", f"validation.shards={corpora['valid']}")
        weights = f"initialize.weights={base}"
        command("train", RECIPES / "restore.yaml", *named(chosen.runs / way), *places, weights, *overrides)
    print(f"\n{'model':12} {'trained':>10} {'steps':>6} {'bits per target byte':>21} {'minutes':>8}")
    print(row("untouched", 0, records_of(chosen.runs / "whole")[:1]), flush=True)
    for way, overrides in WAYS.items():
        print(row(way, trained_parameters(overrides), records_of(chosen.runs / way)), flush=True)
    command("checkpoint", "lineage", chosen.runs / "adapters")


def prepared(books: Path, root: Path) -> dict[str, Path]:
    """Return the corpora of books and of pairs by name, made if they do not exist."""
    corpora = {name: root / name for name in ("books", *PAIRS)}
    if not corpora["books"].exists():
        command("prepare", books / "train", "--out", corpora["books"])
    for name, number in PAIRS.items():
        lines = root / f"{name}.jsonl"
        if not corpora[name].exists():
            lines.write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs_of(books / name, number)), "ascii")
            fields = ("--field", "source", "--target-field", "target")
            command("prepare", lines, *fields, "--out", corpora[name])
    return corpora


def pairs_of(folder: Path, number: int) -> Iterator[dict[str, str]]:
    """Yield pairs of sentences that are drawn from all books of a folder."""
    sentences = [sentence for path in sorted(folder.glob("*.txt")) for sentence in sentences_of(path)]
    for sentence in random.Random(0).sample(sentences, number):
        yield {"source": re.sub("[^a-z0-9 ]", "", sentence.lower()), "target": sentence}


def sentences_of(path: Path) -> Iterator[str]:
    """Yield the sentences of a book that begin with a capital, are ASCII, and have a length of the task."""
    text = re.sub(r"[\s_]+", " ", path.read_text("utf-8"))
    for sentence in re.split(r"(?<=[.!?]) ", text):
        if len(sentence) in LETTERS and sentence.isascii() and sentence[0].isupper() and sentence[-1] in ".!?":
            yield sentence


def named(run: Path) -> tuple[str, ...]:
    """Return the overrides that put a run into a folder."""
    return f"run.root={run.parent}", f"run.name={run.name}", "tracking.enabled=false"


def records_of(run: Path) -> list[dict[str, float]]:
    """Return the journal of a run: step 0 is its validation before the first step."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def row(name: str, trained: int, records: list[dict[str, float]]) -> str:
    """Return a line of the table, given the journal of a run."""
    score = [value for each in records if (value := each.get("validation/bits_per_target_byte")) is not None][-1]
    minutes = sum(record.get("step_seconds", 0.0) for record in records) / 60
    return f"{name:12} {trained:10,} {records[-1]['step']:6,.0f} {score:21.4f} {minutes:8.1f}"


def trained_parameters(overrides: tuple[str, ...]) -> int:
    """Return the number of parameters that a way trains."""
    config = load(RECIPES / "restore.yaml", overrides)
    return sum(each.numel() for each in on_meta(config.model, config.finetune).trained_parameters().values())


def command(*words: object) -> None:
    """Run a byteloom command."""
    subprocess.run([Path(sys.executable).with_name("byteloom"), *map(str, words)], check=True)


def arguments() -> argparse.Namespace:
    """Return the arguments of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path, metavar="BOOKS", help="folder with the folders train and valid")
    parser.add_argument("--runs", type=Path, default=Path("runs/finetuning"), help="folder of corpora and runs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
