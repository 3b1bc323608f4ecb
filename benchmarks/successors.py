"""A training step of the models of comparison.py beside the Transformer's, at equal FLOPs; the cost of their patches.

python benchmarks/successors.py [--size small|tiny] [--precision fp32|bf16] [--quick] [--json PATH]

    steps      of a batch of random bytes in bf16, on one thread, in turn. Seconds are those of
               the processor, because other programs disturb the clock more. Steps do the same work for any bytes:
               a row has the same places for patches
    chunking   seconds of the patches' rule, of gathering their vectors and of adding them back, with gradients, as a
               share of a step: the model without its blocks. That of H-Net has the router, the smoothing and the
               linear residual
    memory     peak of a step's activations by the places for patches of a row, measured on torch's meta device
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.batch import random_batch
from common.compared import BY_ENTROPY, CONTEXT, MODELS, model_tree
from common.report import Metric, report
from data_pipeline.vocabulary import SEPARATOR
from pretrain.engines import EngineConfig, build_engine
from pretrain.estimate.activations import measure_activations
from pretrain.models import build_model, model_config
from pretrain.models.families.hnet import HNet
from pretrain.models.families.spacebyte import SpaceByte
from pretrain.models.patching.chunks import add_at, chunk_places, gather
from pretrain.optim import OptimizerConfig

ROWS, ROUNDS = 8, 3
SIDE = 2048
"""Side of the matrices whose product is the peak."""
CAPACITIES = (64, 128, 256, 512)
CHUNKING = ": chunking"
BASELINE, PATCHED = "Transformer", "SpaceByte"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*MODELS], default="small", help="3.3 or 0.5 million FLOPs a byte")
    parser.add_argument("--precision", choices=[*DTYPES], default="bf16", help="of the passes")
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--json", type=Path, help="write the metrics here as well")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    precision = chosen.precision
    metrics = steps(chosen.size, precision, 1 if chosen.quick else ROUNDS)
    metrics += memory(chosen.size, DTYPES[precision])
    report(f"A training step of {ROWS} rows of {CONTEXT:,} bytes, {precision}", metrics, chosen.json)


def steps(size: str, precision: str, rounds: int) -> list[Metric]:
    """Measure a step of each model in turn, and the chunking of one."""
    square = torch.randn(SIDE, SIDE, dtype=DTYPES[precision])
    work: dict[str, Callable[[], object]] = {"product": lambda: torch.mm(square, square)}
    operations = {"product": 2.0 * SIDE**3}
    batch = random_batch(ROWS, CONTEXT)
    for name in MODELS[size]:
        if name == BY_ENTROPY:
            continue
        model = build_model(model_config(model_tree(size, name, CONTEXT)))
        length = model.sequence_length
        engine = build_engine(EngineConfig.model_validate({"precision": precision}), model, OptimizerConfig(), seed=0)
        if "memory_length" in MODELS[size][name]:
            continue  # a segment is no whole row
        work[name] = lambda engine=engine: engine.train_step(batch, step=0, learning_rate=1e-4)
        operations[name] = float(ROWS * model.step_flops(length))
        if isinstance(model, SpaceByte | HNet):
            work[name + CHUNKING] = chunking(copy.deepcopy(model).to(DTYPES[precision]))
    seconds = in_turn(work, rounds)
    rates = {name: operations[name] / seconds[name] for name in operations}
    metrics = [
        Metric(
            name,
            ROWS * CONTEXT / seconds[name] / 1e3,
            "kB/s",
            f"MFU {rates[name] / rates['product']:.2f}; {rates[name] / rates[BASELINE]:.2f} of the {BASELINE}'s speed "
            f"at equal FLOPs",
        )
        for name in operations
        if name != "product"
    ]
    return metrics + [
        Metric(name, seconds[name] / seconds[name.removesuffix(CHUNKING)], "of a step", "", goal=0.1, better="lower")
        for name in work
        if name.endswith(CHUNKING)
    ]


def chunking(model: SpaceByte | HNet) -> Callable[[], object]:
    """Return a function that makes the patches of a batch, gathers them and adds them back, with gradients."""
    width = model.widths[0] if isinstance(model, SpaceByte) else model.head.shape[1]
    before = torch.randint(0, 256, (ROWS, CONTEXT - 1))
    x = torch.randn(ROWS, CONTEXT, width, dtype=model.head.dtype, requires_grad=True)
    if isinstance(model, SpaceByte):
        model.global_blocks = nn.ModuleList()
    else:
        model.main = nn.Identity()
        for stage in model.stages:
            stage.encoder = stage.decoder = nn.Identity()

    def joined() -> Tensor:
        if isinstance(model, HNet):
            return model.run(0, x, F.pad(before, (1, 0), value=SEPARATOR), [])
        places, used = chunk_places(model.patches(before).starts, model.patcher.capacity)
        return add_at(x, places, used, model.patch_outputs(gather(x, places), 0))

    return lambda: joined().sum().backward()


def in_turn(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of the processor of each function, run in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, function in work.items():
            begin = time.process_time()
            function()
            if number:  # the first call allocates
                seconds[name].append(time.process_time() - begin)
    return {name: statistics.median(times) for name, times in seconds.items()}


def memory(size: str, dtype: torch.dtype) -> list[Metric]:
    """Return the peak of activations by capacity."""
    tree = model_tree(size, PATCHED, CONTEXT)
    return [
        Metric(
            f"{PATCHED}: {capacity} patches a row",
            measure_activations(model_config(tree | {"patches": capacity}), ROWS, dtype).peak / 2**20,
            "MiB",
            "activations at their peak",
        )
        for capacity in CAPACITIES
    ]


if __name__ == "__main__":
    main()
