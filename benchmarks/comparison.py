"""Comparison of the model families with equal training FLOPs on the same bytes in the same order.

python benchmarks/comparison.py DATA [--on NAME;NAME] [--size small|tiny] [--models NAME;NAME] [--steps N] [--context T]
    [--rate R] [--warmup N] [--seeds N,N] [--most-context] [--runs FOLDER] [--out FOLDER]

The corpora are english (books: DATA/books/train, DATA/books/valid), code (the running Python's library), chinese (with
Japanese: DATA/multilingual) and sound (DATA/audio). They are prepared once; later, DATA may be absent.

`byteloom compare` trains each model with the same recipe (configs/comparison.yaml) except `model`. Each has the number
of steps that makes its training FLOPs equal to the others'. `ByteModel.step_flops` counts three forward passes, with
all the patches that a row may have. The models therefore differ in parameters. BLT with patches by entropy first trains
a small model of bytes. Its training counts, and so does its forward pass in each step.

The validation after the last step scores each byte once, in rows that stand alone; --most-context scores them also by
the mode of `byteloom eval` that gives a byte the most context. Full rows have more patches than a row may have, and end
without new ones: their share, and bytes a patch, are of the last steps of training.

The same command resumes the comparison. Results that exist already in the runs folder are not computed again.
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from common.compared import BY_ENTROPY, CONTEXT, MAIN, MODELS, RATES, model_tree
from common.corpora import CORPORA, byteloom, missing_folders, prepared
from common.entropy_patches import ByteModel, byte_model
from common.names import known_names, names
from common.task import Task
from pretrain.estimate.activations import on_meta
from pretrain.models import model_config

BATCHES = {"small": 8192, "tiny": 4096}
"""Bytes of every batch, by size."""
AVERAGED = 20
"""Steps averaged in the plot and in metrics of patches."""
COLOURS = 10
"""Colours of curves, after which they are dashed."""
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
    byte_model: ByteModel | None = None
    """Model of bytes that was trained first, for patches by entropy."""

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
        length = self.tree["sequence_length"]
        return on_meta(model_config(self.tree)).flops(length) / length

    @property
    def flops_before(self) -> float:
        """FLOPs of training before the first step: those of the model of bytes."""
        return 0 if self.byte_model is None else float(self.byte_model.trained["flops"])

    @property
    def flops(self) -> float:
        """FLOPs of all training."""
        return self.flops_before + float(self.trained["flops"])

    @property
    def seconds(self) -> float:
        """Time of all training steps by the clock, the mean over seeds."""
        runs = [self.trained] if self.byte_model is None else [self.byte_model.trained, self.trained]
        return sum(float(run["seconds"]["mean"]) for run in runs)

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
    draw(results, chosen.out / f"comparison-{chosen.size}-{chosen.context}.png")
    print(summary(results))


def compare(chosen: argparse.Namespace, corpus: str) -> list[Result]:
    """Train and score the models on a corpus with the FLOPs of MEGABYTE's steps."""
    train, valid = prepared(corpus, chosen.data, chosen.runs / "corpora")
    rate, batch = chosen.rate or RATES[chosen.size], BATCHES[chosen.size]
    settings = (chosen.runs, chosen.size, chosen.context, batch, chosen.steps, rate, chosen.seeds, chosen.warmup)
    task = Task(corpus, train, valid, *settings)
    trees = {name: model_tree(chosen.size, name, chosen.context) for name in chosen.models}
    alone = {name: tree for name, tree in trees.items() if name != BY_ENTROPY}
    trained = task.trained(task.title, alone, task.flops) if alone else {}
    own = None
    if BY_ENTROPY in trees:
        own = byte_model(task)
        trees[BY_ENTROPY]["patcher"] = own.patcher
        left = task.flops - own.trained["flops"]
        trained |= task.trained(f"{task.title}-after-entropy-model", {BY_ENTROPY: trees[BY_ENTROPY]}, left)
    results = []
    for name, tree in trees.items():
        run = chosen.runs / trained[name]["runs"][0]["run"]
        mode = LONGEST_CONTEXT_MODES.get(tree["family"], "sliding")
        best = f"{bits_per_byte(run, valid, mode):.4f} ({mode})" if chosen.most_context else ""
        results.append(Result(name, tree, trained[name], run, best, own if name == BY_ENTROPY else None))
    return sorted(results, key=lambda result: result.bits)


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
                f"{result.flops:.3g}",
                f"{result.seconds:.0f} s",
                result.shown_bits,
                result.best,
                ", ".join(f"{stage['bytes_per_patch']:.2f}" for stage in stages),
                ", ".join(f"{stage['overflow_rows']:.0%}" for stage in stages),
            ]
        )
    names = ["model", "parameters", "FLOPs a byte, forward", "steps", "read", "training FLOPs", "time", "bits per byte"]
    names += ["most context", "bytes a patch", "full rows"]
    used = [index for index in range(len(names)) if any(row[index] for row in rows)]
    remarks = [str(result.byte_model) for result in results if result.byte_model is not None]
    return "\n".join([corpus, table([names[i] for i in used], ([row[i] for i in used] for row in rows)), *remarks])


def summary(results: dict[str, list[Result]]) -> str:
    """Return a table of bits per byte by model and corpus, in the order of the first corpus."""
    bits = {corpus: {each.name: each.shown_bits for each in some} for corpus, some in results.items()}
    first = next(iter(bits.values()))
    return table(["model", *bits], ([name, *(some[name] for some in bits.values())] for name in first))


def table(names: list[str], rows: Iterable[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw(results: dict[str, list[Result]], path: Path) -> None:
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
            spent = result.flops_before + step[width - 1 :] * result.trained["step_flops"]
            label = f"{result.name}, {result.trained['parameters'] / 1e6:.1f} M parameters"
            lowest = min(lowest, float(smooth.min()))
            number = names.index(result.name)
            style = "-" if number < COLOURS else "--"
            axes.plot(spent, smooth, style, label=label, color=f"C{number % COLOURS}")
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
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of the raw data")
    parser.add_argument(
        "--on", type=names, metavar="NAME;NAME", default=[*CORPORA], help=f"some of {';'.join(CORPORA)}; default: all"
    )
    parser.add_argument("--size", choices=[*MODELS], default="small", help="3.3 or 0.5 million FLOPs a byte")
    parser.add_argument(
        "--models",
        type=names,
        metavar="NAME;NAME",
        default=MAIN,
        help=f"a wrong name prints all names; default: {';'.join(MAIN)}",
    )
    parser.add_argument(
        "--steps", type=positive, default=600, help="of MEGABYTE; the other models get the same FLOPs; default: 600"
    )
    parser.add_argument("--context", type=positive, default=CONTEXT, help=f"bytes of a row; default: {CONTEXT:,}")
    parser.add_argument("--rate", type=float, help="peak learning rate; default: that of the size")
    parser.add_argument("--warmup", type=positive, help="steps in which the rate rises; default: a tenth of all")
    parser.add_argument("--seeds", default="0", help="by commas; the first is plotted; default: 0")
    parser.add_argument("--most-context", action="store_true", help="score with the most context as well")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for runs and corpora; default: runs")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for the plot; default: runs")
    chosen = parser.parse_args()
    known_names(parser, "on", chosen.on, CORPORA)
    known_names(parser, "models", chosen.models, MODELS[chosen.size])
    if chosen.context > BATCHES[chosen.size]:
        parser.error(f"--context: {chosen.context} is more than the {BATCHES[chosen.size]} bytes of a batch")
    if missing := missing_folders(chosen.on, chosen.data, chosen.runs / "corpora"):
        parser.error(f"missing in DATA: {', '.join(map(str, missing))}; leave out their corpora by --on")
    return chosen


def positive(text: str) -> int:
    """Return a whole number above 0."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


if __name__ == "__main__":
    main()
