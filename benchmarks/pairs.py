"""Two tasks for an encoder with a decoder: write a string in reverse, and write it in capitals.

python benchmarks/pairs.py [reverse] [uppercase] [--fresh N] [--seed S] [--runs FOLDER]

For each task this writes pairs of strings of 64 bytes as JSON lines, prepares them, trains
configs/encoder_decoder/strings.yaml with `byteloom train`, and prints how many fresh strings the model writes without a
fault, by its cached decoder. A second start resumes the first.
"""

import argparse
import json
import random
import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import byteloom
from pretrain.evaluation.generation import Sampling

RECIPE = Path(__file__).parents[1] / "configs/encoder_decoder/strings.yaml"
TASKS: dict[str, Callable[[str], str]] = {"reverse": lambda text: text[::-1], "uppercase": str.upper}
"""Function that each task learns."""
LETTERS = string.ascii_letters + string.digits + " .,"
LENGTH = 64
"""Bytes of a string."""
PAIRS, HOLDOUT = 100_000, 0.003
SEED = 0


def main() -> None:
    """Train the tasks, and print a table."""
    chosen = arguments()
    print(f"{'task':12} {'fresh strings':>14} {'right':>8} {'steps':>7} {'minutes':>8}")
    for task in chosen.tasks:
        run = train(task, chosen.runs)
        right = count_right(run, task, chosen.fresh, chosen.seed)
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        minutes = sum(record.get("step_seconds", 0.0) for record in records) / 60
        print(f"{task:12} {chosen.fresh:14,} {right:8,} {records[-1]['step']:7,} {minutes:8.1f}", flush=True)


def train(task: str, root: Path) -> Path:
    """Prepare the pairs of a task and train on them; return the run's folder."""
    lines, corpus = root / f"{task}.jsonl", root / "corpora" / task
    if not corpus.exists():
        root.mkdir(parents=True, exist_ok=True)
        write_pairs(lines, task)
        fields = ("--field", "source", "--target-field", "target")
        command("prepare", lines, *fields, "--holdout", HOLDOUT, "--out", corpus)
    places = (f"data.shards={corpus}/train", f"validation.shards={corpus}/validation")
    command("train", RECIPE, f"run.root={root}", f"run.name={task}", *places)
    return root / task


def write_pairs(path: Path, task: str) -> None:
    """Write the pairs of a task as JSON lines."""
    chosen = random.Random(SEED)
    with path.open("w", encoding="ascii") as file:
        for _ in range(PAIRS):
            source = some_string(chosen)
            file.write(json.dumps({"source": source, "target": TASKS[task](source)}) + "\n")


def some_string(chosen: random.Random) -> str:
    """Return a random string."""
    return "".join(chosen.choices(LETTERS, k=LENGTH))


def count_right(run: Path, task: str, fresh: int, seed: int) -> int:
    """Return how many fresh strings the model of a run writes without a fault. The model has seen none of them."""
    chosen = random.Random(seed)
    sources = [some_string(chosen) for _ in range(fresh)]
    model = byteloom.load(run)
    written = [bytearray() for _ in sources]
    sampling = Sampling(temperature=0)
    for row, byte in model.generate_rows([source.encode() for source in sources], [2 * LENGTH] * fresh, sampling):
        written[row].append(byte)
    return sum(TASKS[task](source).encode() == found for source, found in zip(sources, written, strict=True))


def command(*words: object) -> None:
    """Run a byteloom command."""
    subprocess.run([Path(sys.executable).with_name("byteloom"), *map(str, words)], check=True)


def arguments() -> argparse.Namespace:
    """Return the arguments of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", choices=[*TASKS], default=[*TASKS], metavar="TASK", help="default: both")
    parser.add_argument("--fresh", type=int, default=500, help="fresh strings")
    parser.add_argument("--seed", type=int, default=1, help="seed of the fresh strings; training has 0")
    parser.add_argument("--runs", type=Path, default=Path("runs/pairs"), help="folder of corpora and runs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
