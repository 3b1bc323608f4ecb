"""Comparison of the model families with equal training FLOPs on the same bytes in the same order.

python benchmarks/comparison.py DATA [--on NAME;NAME] [--size small|tiny] [--models NAME;NAME] [--steps N] [--context T]
    [--rate R] [--seeds N,N] [--most-context] [--runs FOLDER] [--out FOLDER]

DATA holds the unpacked folders books, multilingual and audio. The corpora are English books, code (the running Python's
library), Chinese with Japanese, and sound. `byteloom compare` trains each model with the same recipe
(configs/comparison.yaml) except `model`. Each has the number of steps that makes its training FLOPs equal to the
others'. `ByteModel.flops` counts a forward pass, with all the patches that a row may have; training counts as three of
them. The models therefore differ in parameters. The validation after the last step scores each byte once, in rows that
stand alone; --most-context scores them also by the mode of `byteloom eval` that gives a byte the most context. Results
that exist already in the runs folder are not computed again.
"""

import argparse
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from common.compared import CONTEXT, MAIN, MODELS, RATES, flops_per_byte, model_tree
from common.corpora import CORPORA, byteloom, prepared
from pretrain.config.catalogue import TRAINING_PASSES
from pretrain.estimate.activations import on_meta
from pretrain.models import model_config

RECIPE = Path(__file__).parents[1] / "configs/comparison.yaml"
BATCHES = {"small": 8192, "tiny": 4096}
"""Bytes of every batch, by size."""
WARMUP = 0.1
"""Share of the steps in which the learning rate rises."""
AVERAGED = 20
"""Steps averaged in the plot and in metrics of patches."""
LONGEST_CONTEXT_MODES = {"megabyte": "sliding-strided", "perceiver_ar": "windows", "transformer_xl": "memory"}
"""Mode of `byteloom eval` that gives a byte the most context; sliding for the others. Windows of a Perceiver AR slide
by its latents."""


@dataclass(frozen=True)
class Result:
    """One model on one corpus."""

    name: str
    tree: dict[str, Any]
    trained: dict[str, Any]
    """Entry of `byteloom compare --json`."""
    run: Path
    best: str
    """Bits per byte with the most context, with the mode; empty if not asked for."""

    @property
    def bits(self) -> float:
        """Bits per byte of the validation after the last step."""
        return float(self.trained["validation_loss"]["mean"])

    @property
    def shown_bits(self) -> str:
        """Bits per byte, with the deviation over seeds."""
        deviation = self.trained["validation_loss"]["deviation"]
        return f"{self.bits:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")

    @property
    def forward(self) -> float:
        """FLOPs of the forward pass by byte."""
        return float(self.trained["step_flops"]) / TRAINING_PASSES / self.trained["step_bytes"]

    def records(self, name: str) -> list[dict[str, float]]:
        """Return the records of the run's metrics that have a number."""
        records = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        return [record for record in records if name in record]

    def patches(self) -> list[dict[str, float]]:
        """Return the metrics of patches by stage, means of the last steps."""
        stages = []
        while records := self.records(f"patches/{len(stages)}/bytes_per_patch")[-AVERAGED:]:
            begin = f"patches/{len(stages)}/"
            names = [name for name in records[-1] if name.startswith(begin)]
            stages.append({name[len(begin) :]: float(np.mean([each[name] for each in records])) for name in names})
        return stages

    def useful(self, stages: list[dict[str, float]]) -> float:
        """Return the FLOPs of the forward pass by byte, without those of empty places for patches."""
        length = self.tree["sequence_length"]
        if not stages:
            return self.forward
        counts = [length / stage["bytes_per_patch"] for stage in stages]
        return on_meta(model_config(self.tree)).useful_flops(length, counts) / length


def main() -> None:
    chosen = arguments()
    results: dict[str, list[Result]] = {}
    for corpus in chosen.on:
        results[corpus] = compare(chosen, corpus)
        print(details(corpus, results[corpus]), flush=True)
    chosen.out.mkdir(parents=True, exist_ok=True)
    draw(results, BATCHES[chosen.size], chosen.out / f"comparison-{chosen.size}-{chosen.context}.png")
    print(summary(results))


def compare(chosen: argparse.Namespace, corpus: str) -> list[Result]:
    """Train and score the models on a corpus with the FLOPs of MEGABYTE's steps."""
    train, valid = prepared(corpus, chosen.data, chosen.runs / "corpora")
    context, batch = chosen.context, BATCHES[chosen.size]
    trees = {name: model_tree(chosen.size, name, context) for name in chosen.models}
    budget = chosen.steps * batch * flops_per_byte(model_tree(chosen.size, "MEGABYTE", context))
    words = [f"{key_of(name)}={RECIPE}" for name in trees]
    for name, tree in trees.items():
        rows = batch // tree["sequence_length"]
        fields = {
            "model": json.dumps(tree),
            "data.lanes": rows,
            "train.global_batch": rows,
            "train.micro_batch": rows,
            "optimizer.schedule.warmup_steps": round(WARMUP * budget / batch / flops_per_byte(tree)),
        }
        words += [f"{key_of(name)}:{field}={value}" for field, value in fields.items()]
    words += [f"run.root={chosen.runs}", f"data.shards={train}", f"validation.shards={valid}"]
    rate = chosen.rate or RATES[chosen.size]
    words += [f"optimizer.learning_rate={rate}", "engine.precision=bf16", "health.spike=ignore"]
    title = f"{chosen.size}-{corpus}-{context}-{chosen.steps}-at-{rate:g}"
    printed = byteloom("compare", *words, "--flops", budget, "--name", title, "--seeds", chosen.seeds, "--json")
    by_key = {each["name"]: each for each in json.loads(printed)["recipes"]}
    results = []
    for name, tree in trees.items():
        trained = by_key[key_of(name)]
        run = chosen.runs / trained["runs"][0]["run"]
        mode = LONGEST_CONTEXT_MODES.get(tree["family"], "sliding")
        best = f"{bits_per_byte(run, valid, mode):.4f} ({mode})" if chosen.most_context else ""
        results.append(Result(name, tree, trained, run, best))
    return sorted(results, key=lambda result: result.bits)


def key_of(name: str) -> str:
    """Return the name of a model in the comparison."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def bits_per_byte(run: Path, corpus: Path, mode: str) -> float:
    """Score a corpus, whose documents begin at the start of a row."""
    path = run / f"{mode}.json"
    if not path.exists():
        path.write_text(byteloom("eval", run, corpus, "--mode", mode, "--begin", "start", "--json"), encoding="utf-8")
    return float(json.loads(path.read_text())["total"]["bits_per_byte"])


def details(corpus: str, results: list[Result]) -> str:
    """Return a table of the models on a corpus: results, cost and patches."""
    rows = []
    for result in results:
        trained, stages = result.trained, result.patches()
        cost = f"{result.forward / 1e6:.2f} M"
        if stages:
            cost += f" ({result.useful(stages) / 1e6:.2f} M useful)"
        rows.append(
            [
                result.name,
                f"{trained['parameters']:,}",
                cost,
                f"{trained['steps']:,}",
                f"{trained['bytes'] / 1e6:.2f} MB",
                f"{trained['seconds']['mean']:.0f} s",
                result.shown_bits,
                result.best,
                ", ".join(f"{stage['bytes_per_patch']:.2f}" for stage in stages),
                ", ".join(f"{stage['overflow_rows']:.0%}" for stage in stages),
            ]
        )
    names = ["model", "parameters", "FLOPs a byte, forward", "steps", "read", "training", "bits per byte"]
    names += ["most context", "bytes a patch", "full rows"]
    used = [index for index in range(len(names)) if any(row[index] for row in rows)]
    return f"{corpus}\n" + table([names[i] for i in used], ([row[i] for i in used] for row in rows))


def summary(results: dict[str, list[Result]]) -> str:
    """Return a table of bits per byte by model and corpus, in the order of the first corpus."""
    bits = {corpus: {each.name: each.shown_bits for each in some} for corpus, some in results.items()}
    first = next(iter(bits.values()))
    return table(["model", *bits], ([name, *(some[name] for some in bits.values())] for name in first))


def table(names: list[str], rows: Iterable[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw(results: dict[str, list[Result]], batch: int, path: Path) -> None:
    """Plot training bits per byte, as running means, over training FLOPs, a picture for each corpus."""
    columns = min(len(results), 2)
    lines = -(-len(results) // columns)
    figure = Figure(figsize=(8 if columns == 1 else 13, 5 * lines), layout="constrained")
    names = [result.name for result in next(iter(results.values()))]
    for axes, (corpus, some) in zip(figure.subplots(lines, columns, squeeze=False).flat, results.items(), strict=False):
        lowest = min(result.bits for result in some)
        for result in some:
            records = result.records("train/bits_per_byte")
            bits = np.array([record["train/bits_per_byte"] for record in records])
            step = np.array([record["step"] for record in records])
            width = min(AVERAGED, len(bits))
            smooth = np.convolve(bits, np.full(width, 1 / width), "valid")
            spent = step[width - 1 :] * TRAINING_PASSES * result.forward * batch
            label = f"{result.name}, {result.trained['parameters'] / 1e6:.1f} M parameters"
            lowest = min(lowest, float(smooth.min()))
            axes.plot(spent, smooth, label=label, color=f"C{names.index(result.name)}")
        axes.set(title=corpus, xlabel="training FLOPs", ylabel=f"bits per byte, mean of {AVERAGED} steps")
        axes.set_ylim(lowest - 0.1, lowest + 2.6)
        axes.grid(alpha=0.3)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns + 1, fontsize="small"
    )
    figure.savefig(path, dpi=110)


def arguments() -> argparse.Namespace:
    """Return the arguments of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def names(text: str) -> list[str]:
        return text.split(";")

    parser.add_argument("data", type=Path, help="folder that holds the folders books, multilingual and audio")
    parser.add_argument("--on", type=names, default=list(CORPORA), help="corpora, by semicolons; default: all")
    parser.add_argument("--size", choices=[*MODELS], default="small", help="3.3 or 0.5 million FLOPs a byte")
    parser.add_argument("--models", type=names, help="names, by semicolons; default: those of the successors")
    parser.add_argument("--steps", type=int, default=600, help="steps of MEGABYTE; the other models get the same FLOPs")
    parser.add_argument("--context", type=int, default=CONTEXT, help="bytes of a row")
    parser.add_argument("--rate", type=float, help="peak learning rate; default: that of the size")
    parser.add_argument("--seeds", default="0", help="seeds, by commas; the first is plotted")
    parser.add_argument("--most-context", action="store_true", help="score with the most context as well")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for runs and corpora")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for the plot")
    chosen = parser.parse_args()
    chosen.models = chosen.models or MAIN
    return chosen


if __name__ == "__main__":
    main()
