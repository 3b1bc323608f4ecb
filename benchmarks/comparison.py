"""Comparison of the model families with equal training FLOPs on the same bytes in the same order.

python benchmarks/comparison.py BOOKS [--steps N] [--context T] [--models NAME;NAME] [--runs FOLDER] [--out FOLDER]

BOOKS holds the folders train and valid with text files. `byteloom compare` trains each model with the same recipe
(configs/comparison.yaml) except `model`. All models cost about the same per byte, and each has the number of steps that
makes its training FLOPs equal to the others'. `ByteModel.flops` counts a forward pass; training counts as three of
them. The models therefore differ in parameters. `byteloom eval` scores each byte of the first valid book, by name,
once. Results that exist already in the runs folder are not computed again.
"""

import argparse
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch

from pretrain.models import build_model, model_config

HERE = Path(__file__).parent
RECIPE = HERE.parent / "configs/comparison.yaml"
CONTEXT, ROWS = 1024, 8
"""Default context, and rows of every batch."""
AVERAGED = 20
"""Steps averaged in the plot."""
MODELS: dict[str, dict[str, object]] = {
    "MEGABYTE": {
        "family": "megabyte",
        "patch_size": 8,
        "global_model": {"width": 512, "layers": 3, "heads": 8},
        "local_model": {"width": 128, "layers": 2, "heads": 2},
        "initial_std": 0.02,
    },
    "Perceiver AR": {
        "family": "perceiver_ar",
        "latents": 256,
        "latent_model": {"width": 256, "layers": 5, "heads": 4},
        "cross_heads": 4,
    },
    "Transformer": {"family": "transformer", "width": 144, "layers": 3, "heads": 3, "initial_std": 0.02},
    "Transformer, window 128": {
        "family": "transformer",
        "width": 192,
        "layers": 3,
        "heads": 3,
        "window": 128,
        "initial_std": 0.02,
    },
    "Transformer-XL": {"family": "transformer_xl", "memory_length": 256, "width": 144, "layers": 2, "heads": 3},
}
LONGEST_CONTEXT_MODES = {
    "megabyte": "sliding-strided",
    "perceiver_ar": "windows",
    "transformer": "sliding",
    "transformer_xl": "memory",
}
"""Mode of `byteloom eval` that gives a byte the most context. Windows of a Perceiver AR slide by its latents."""


@dataclass(frozen=True)
class Result:
    name: str
    parameters: int
    flops_per_byte: float
    """FLOPs of the forward pass."""
    steps: int
    run: Path
    alone: float
    """Bits per byte in independent windows."""
    best: float
    """Bits per byte in the mode of LONGEST_CONTEXT_MODES."""
    mode: str


def main() -> None:
    chosen = arguments()
    train, valid = chosen.runs / "comparison-train", chosen.runs / "comparison-valid"
    first = min((chosen.books / "valid").iterdir())
    for source, corpus in ((chosen.books / "train", train), (first, valid)):
        if not corpus.exists():
            byteloom("prepare", source, "--out", corpus)
    trained = compare(chosen, train)
    results = [scored(name, trained[key_of(name)], chosen.runs, valid) for name in chosen.models]
    (chosen.out / "results.png").parent.mkdir(parents=True, exist_ok=True)
    draw(results, chosen.out / "results.png", chosen.context)
    print(table(results, first))


def compare(chosen: argparse.Namespace, train: Path) -> dict[str, dict[str, Any]]:
    """Train the models with the FLOPs of MEGABYTE's steps; return the results of `byteloom compare` by model."""
    context = chosen.context
    budget = 3 * flops("MEGABYTE", context) * ROWS * chosen.steps
    models = [f"{key_of(name)}={RECIPE}" for name in chosen.models]
    sections = [f"{key_of(name)}:model={json.dumps(model_tree(name, context))}" for name in chosen.models]
    words = [*models, *sections, f"run.root={chosen.runs}", f"data.shards={train}"]
    printed = byteloom("compare", *words, "--flops", budget, "--name", f"comparison-{context}-{chosen.steps}", "--json")
    return {each["name"]: each for each in json.loads(printed)["recipes"]}


def scored(name: str, trained: dict[str, Any], runs: Path, valid: Path) -> Result:
    """Score the run of a model."""
    run = runs / trained["runs"][0]["run"]
    mode = LONGEST_CONTEXT_MODES[str(MODELS[name]["family"])]
    alone, best = (bits_per_byte(run, valid, each) for each in ("windows", mode))
    forward = trained["step_flops"] / 3 / trained["step_bytes"]
    return Result(name, trained["parameters"], forward, trained["steps"], run, alone, best, mode)


def key_of(name: str) -> str:
    """Return the name of a model in the comparison."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def model_tree(name: str, context: int) -> dict[str, object]:
    """Return the section `model` of a recipe. A Perceiver AR has a quarter of the context as latents."""
    tree = {"sequence_length": context, "dropout": 0.0, **MODELS[name]}
    return tree | {"latents": context // 4} if "latents" in tree else tree


def flops(name: str, context: int) -> int:
    """Return the FLOPs of the forward pass over one row."""
    with torch.device("meta"):
        return build_model(model_config(model_tree(name, context))).flops(context)


def byteloom(*arguments: object) -> str:
    """Run a command and return its standard output."""
    command = [Path(sys.executable).parent / "byteloom", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def bits_per_byte(run: Path, corpus: Path, mode: str) -> float:
    path = run / f"{mode}.json"
    if not path.exists():
        path.write_text(byteloom("eval", run, corpus, "--mode", mode, "--begin", "start", "--json"), encoding="utf-8")
    return float(json.loads(path.read_text())["total"]["bits_per_byte"])


def table(results: list[Result], book: Path) -> str:
    lines = [
        f"| model | parameters | forward FLOPs per byte | steps | {book.stem}: independent windows | most context |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in sorted(results, key=lambda result: result.best):
        cost = f"{r.flops_per_byte / 1e6:.2f} M"
        lines.append(
            f"| {r.name} | {r.parameters:,} | {cost} | {r.steps:,} | {r.alone:.4f} | {r.best:.4f} ({r.mode}) |"
        )
    return "\n".join(lines)


def draw(results: list[Result], path: Path, context: int) -> None:
    """Plot training bits per byte, as running means, over training FLOPs."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for result in results:
        records = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
        records = [record for record in records if "train/bits_per_byte" in record]
        bits = np.array([record["train/bits_per_byte"] for record in records])
        step = np.array([record["step"] for record in records])
        width = min(AVERAGED, len(bits))
        smooth = np.convolve(bits, np.full(width, 1 / width), "valid")
        spent = step[width - 1 :] * 3 * result.flops_per_byte * ROWS * context
        axes.plot(spent, smooth, label=f"{result.name}, {result.parameters / 1e6:.1f} M parameters")
    axes.set(xlabel="training FLOPs", ylabel=f"bits per byte, mean of {AVERAGED} steps", ylim=(None, 4.5))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path, help="folder that holds the folders train and valid")
    parser.add_argument("--steps", type=int, default=600, help="steps of MEGABYTE; the other models get the same FLOPs")
    parser.add_argument("--context", type=int, default=CONTEXT, help="bytes of a row")
    parser.add_argument(
        "--models", type=lambda text: text.split(";"), default=list(MODELS), help="names, by semicolons"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for runs and corpora")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for the plot")
    return parser.parse_args()


if __name__ == "__main__":
    main()
