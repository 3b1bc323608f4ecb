"""Bits per byte against latents at test time, for one trained Perceiver AR.

python benchmarks/latents.py RUN CORPUS [--most N] [--json PATH] [--plot PATH]

RUN is a run, a checkpoint or an export, CORPUS a corpus or a file. It is scored with each power of two up to N latents,
as by `byteloom eval --latents n --stride n`: windows move by n bytes, a byte has between T - n and T bytes of context,
and is scored once. More latents take more of the latent model and fewer cross-attends. Perceiver AR's paper
(arXiv:2202.07765) asks what a trained model gains from more of them at test time. Matplotlib comes with mlflow.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

import byteloom
from common.report import Metric, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("corpus", metavar="CORPUS")
    parser.add_argument("--most", type=int, help="most latents. Default: four times those of the training")
    parser.add_argument("--json", type=Path, help="write the metrics here as well")
    parser.add_argument("--plot", type=Path, help="write the plot as PNG here")
    chosen = parser.parse_args()
    config = byteloom.load(chosen.run).config
    most = min(chosen.most or 4 * config.latents, config.sequence_length)
    counts = [2**n for n in range(3, most.bit_length()) if 2**n <= most]
    bits = {n: byteloom.load(chosen.run, latents=n).bits_per_byte(chosen.corpus, stride=n) for n in counts}
    metrics = [
        Metric(f"{count} latents", value, "bits per byte", "as in training" if count == config.latents else "")
        for count, value in bits.items()
    ]
    report("Latents at test time", metrics, chosen.json)
    if chosen.plot:
        figure = Figure(figsize=(6, 4), layout="constrained")
        axis = figure.subplots()
        axis.plot(list(bits), list(bits.values()), "o-")
        axis.axvline(config.latents, linestyle=":", color="grey", label="latents of the training")
        axis.set(xlabel="latents at test time", ylabel="bits per byte")
        axis.set_xscale("log", base=2)
        axis.grid(visible=True, alpha=0.3)
        axis.legend()
        figure.savefig(chosen.plot, dpi=110)


if __name__ == "__main__":
    main()
