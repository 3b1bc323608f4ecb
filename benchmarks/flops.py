"""FLOPs a byte against size and context: MEGABYTE's figure 3 (arXiv:2305.07185), drawn from `ByteModel.flops`.

python benchmarks/flops.py [--json PATH] [--plot PATH]

Forward passes of full rows. Each MEGABYTE (P = 8) has the numbers of parameters of the figure, and each Transformer the
sum of both: 12 L D². The paper does not print their layers and widths; these are the ones here. The linear Transformer
is the Transformer with 9 D operations a layer and byte in place of attention, as the paper counts. The Sparse
Transformer has fixed attention, with 32 columns a block and a stride near the root of T. Models are built on the meta
device, so nothing is computed. Matplotlib comes with mlflow.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from matplotlib.figure import Figure

from common.report import Metric, report
from pretrain.estimate.activations import on_meta
from pretrain.models import ByteModel, model_config

PATCH = 8
SIZES = {
    "603M": ((9, 2048, 16), (12, 1024, 16), (12, 2048, 16)),
    "6.4B": ((29, 4096, 32), (12, 2048, 16), (32, 4096, 32)),
    "173B": ((94, 12_288, 96), (16, 4096, 32), (96, 12_288, 96)),
}
"""Layers, width and heads of MEGABYTE's global and local model, and of the Transformer, by parameters in all."""
LENGTHS = [2**n for n in range(10, 21)]
LINEAR = 9
"""Operations of linear attention a layer, channel and byte."""
MODELS = ("Transformer", "Sparse Transformer", "linear Transformer", "MEGABYTE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the metrics here as well")
    parser.add_argument("--plot", type=Path, help="write the plot as PNG here")
    chosen = parser.parse_args()
    curves = {(size, name): [per_byte(T) for T in LENGTHS] for size in SIZES for name, per_byte in models(size)}
    metrics = [
        Metric(f"{size} {name}", values[LENGTHS.index(2**13)] / 1e9, "GFLOP/byte", f"{values[-1] / 1e9:,.1f} at 2^20")
        for (size, name), values in curves.items()
    ]
    report("Forward pass at 8,192 bytes", metrics, chosen.json)
    if chosen.plot:
        plot(curves, chosen.plot)


def models(size: str) -> Iterator[tuple[str, Callable[[int], float]]]:
    """Yield each model's name, and the function from the context to FLOPs a byte."""
    of_global, of_local, (layers, width, heads) = SIZES[size]
    stack = {"layers": layers, "width": width, "heads": heads}
    plain = build(family="transformer", **stack)
    megabyte = build(family="megabyte", patch_size=PATCH, global_model=named(of_global), local_model=named(of_local))

    def of_attention(length: int) -> float:
        return 4 * layers * width * length

    def sparse(length: int) -> float:
        stride = 2 ** round((length.bit_length() - 1) / 2)
        fields = {"attention": "fixed", "attention_stride": stride, "attention_summary": min(32, stride)}
        return build(family="transformer", **stack, **fields).flops(length) / length

    yield "Transformer", lambda length: plain.flops(length) / length
    yield "Sparse Transformer", sparse
    yield (
        "linear Transformer",
        lambda length: plain.flops(length) / length - of_attention(length) + LINEAR * layers * width,
    )
    yield "MEGABYTE", lambda length: megabyte.flops(length) / length


def named(size: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(("layers", "width", "heads"), size, strict=True))


def build(**fields: object) -> ByteModel:
    return on_meta(model_config({"sequence_length": LENGTHS[-1], "positions": "rotary", **fields}))


def plot(curves: dict[tuple[str, str], list[float]], path: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axis, size in zip(figure.subplots(1, len(SIZES), sharey=True), SIZES, strict=True):
        for name in MODELS:
            axis.plot(LENGTHS, [value / 1e9 for value in curves[size, name]], label=name)
        axis.set(title=f"{size} parameters", xlabel="context (bytes)", yscale="log")
        axis.set_xscale("log", base=2)
        axis.grid(visible=True, alpha=0.3)
    figure.axes[0].set_ylabel("GFLOP a byte, forward")
    figure.axes[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
