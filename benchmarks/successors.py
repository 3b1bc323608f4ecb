"""A training step of the models of comparison.py beside the Transformer's, at equal FLOPs; the cost of their patches.

python benchmarks/successors.py [--size small|tiny] [--models NAME;NAME] [--precision fp32|bf16] [--quick] [--json PATH]

    steps      of a batch of random bytes in bf16, on one thread, in turn. Seconds are those of
               the processor, because other programs disturb the clock more. Steps do the same work for any bytes:
               a row has the same places for patches
    chunking   seconds of the patches' rule, of gathering their vectors and of adding them back, with gradients, as a
               share of a step: the model without its blocks. That of H-Net has the router, the smoothing and the
               linear residual. That of BLT has the attention between positions and patches. Its share of the FLOPs
               says how much of it is matrix products. The rule of a BLT alone, without gradients, is also given: by
               entropy, it is a pass of a model of bytes, here with random weights
    memory     peak of a step's activations by the places for patches of a row, measured on torch's meta device
"""

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common.batch import random_batch
from common.compared import BY_ENTROPY, CONTEXT, MODELS, byte_model_tree, model_tree
from common.entropy_patches import export_untrained
from common.names import known_names, names
from common.report import Metric, in_turn, report
from data_pipeline.vocabulary import SEPARATOR
from pretrain.engines import EngineConfig, build_engine
from pretrain.estimate.activations import measure_activations
from pretrain.models import ByteModel, build_model, model_config
from pretrain.models.families.blt import BLT
from pretrain.models.families.hnet import HNet
from pretrain.models.families.spacebyte import SpaceByte
from pretrain.models.patching.chunks import add_at, chunk_places, gather
from pretrain.models.patching.cross_attention import ReadingBlock
from pretrain.optim import OptimizerConfig

ROWS, ROUNDS = 8, 3
SIDE = 2048
"""Side of the matrices whose product is the peak."""
CAPACITIES = (64, 128, 256, 512)
CHUNKING, RULE = ": chunking", ": rule alone"
BASELINE, PATCHED = "Transformer", "SpaceByte"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*MODELS], default="small", help="3.3 or 0.5 million FLOPs a byte")
    parser.add_argument(
        "--models", type=names, metavar="NAME;NAME", help=f"default: all; {BASELINE} is always measured"
    )
    parser.add_argument("--precision", choices=[*DTYPES], default="bf16", help="of the passes")
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--json", type=Path, help="write the metrics here as well")
    chosen = parser.parse_args()
    known = [*MODELS[chosen.size]]
    asked = known_names(parser, "models", [BASELINE, *(chosen.models or known)], known)
    torch.set_num_threads(1)
    precision = chosen.precision
    with tempfile.TemporaryDirectory() as folder:
        models = {name: built(chosen.size, name, Path(folder)) for name in known if name in asked}
        metrics = steps(models, precision, 1 if chosen.quick else ROUNDS)
    metrics += memory(chosen.size, DTYPES[precision])
    report(f"A training step of {ROWS} rows of {CONTEXT:,} bytes, {precision}", metrics, chosen.json)


def built(size: str, name: str, folder: Path) -> ByteModel:
    """Return a model. If it has patches by entropy, write an export of a model of bytes with random weights for it."""
    tree = model_tree(size, name, CONTEXT)
    if name == BY_ENTROPY:
        export_untrained(byte_model_tree(size, CONTEXT), folder / "export")
        tree["patcher"] = {"name": "entropy", "model": str(folder / "export"), "threshold": 0.0}
    return build_model(model_config(tree))


def steps(models: dict[str, ByteModel], precision: str, rounds: int) -> list[Metric]:
    """Measure a step of each model in turn, and the chunking of one."""
    square = torch.randn(SIDE, SIDE, dtype=DTYPES[precision])
    work: dict[str, Callable[[], object]] = {"product": lambda: torch.mm(square, square)}
    operations = {"product": 2.0 * SIDE**3}
    products: dict[str, float] = {}
    batch = random_batch(ROWS, CONTEXT)
    for name, model in models.items():
        if model.sequence_length != CONTEXT or name == "Transformer-XL":
            continue  # a segment is no whole row
        engine = build_engine(EngineConfig.model_validate({"precision": precision}), model, OptimizerConfig(), seed=0)
        work[name] = lambda engine=engine: engine.train_step(batch, step=0, learning_rate=1e-4)
        operations[name] = float(ROWS * model.step_flops(CONTEXT))
        if isinstance(model, SpaceByte | HNet | BLT):
            joined = chunking(copy.deepcopy(model).to(DTYPES[precision]))
            work[name + CHUNKING] = lambda joined=joined: joined().sum().backward()
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                joined()
            products[name + CHUNKING] = counter.get_total_flops() / (ROWS * model.flops(CONTEXT))
        if isinstance(model, BLT):
            work[name + RULE] = rule_alone(model)
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
    parts = {
        name: next(end for end in (CHUNKING, RULE) if name.endswith(end)) for name in work if name not in operations
    }
    return metrics + [
        Metric(
            name,
            seconds[name] / seconds[name.removesuffix(end)],
            "of a step",
            f"{products[name]:.1%} of the FLOPs of a forward pass" if name in products else "",
            goal=0.1 if end == CHUNKING else None,
            better="lower",
        )
        for name, end in parts.items()
    ]


def chunking(model: SpaceByte | HNet | BLT) -> Callable[[], Tensor]:
    """Return a function that makes the patches of a batch and moves vectors to them and back."""
    before = torch.randint(0, 256, (ROWS, CONTEXT - 1))
    x = torch.randn(ROWS, CONTEXT, model.head.shape[1], dtype=model.head.dtype, requires_grad=True)
    if isinstance(model, HNet):
        model.main = nn.Identity()
        for stage in model.stages:
            for stack in (stage.encoder, stage.decoder):
                stack.blocks, stack.norm = nn.ModuleList(), nn.Identity()
    else:
        model.global_blocks = nn.ModuleList()

    def joined() -> Tensor:
        read = F.pad(before, (1, 0), value=SEPARATOR)
        if isinstance(model, HNet):
            return model.run(0, x, read, [])
        if isinstance(model, BLT):
            return exchanged(model, x, read)
        places, used = chunk_places(model.patches(before).starts, model.patcher.capacity)
        return add_at(x, places, used, model.patch_outputs(gather(x, places), 0))

    return joined


def exchanged(model: BLT, x: Tensor, read: Tensor) -> Tensor:
    """Move vectors to the patches of a BLT and back, without its Transformer blocks.

    Args:
        model: without global blocks.
        x: (rows, n, d) positions.
        read: (rows, n) ids that they read.
    """
    starts = model.patcher(read).starts
    members = model.members(starts, model.patcher.capacity, model.documents(read))
    slots = model.patch_outputs(model.patch_inputs([x] * len(model.slot_blocks), members), members.documents)
    newest = starts.cumsum(1) - 1
    for block in model.decoder_blocks:
        if isinstance(block, ReadingBlock):
            x = block.read(x, slots, newest)
    return x


def rule_alone(model: BLT) -> Callable[[], object]:
    """Return a function that finds where the patches of a batch start."""
    read = F.pad(torch.randint(0, 256, (ROWS, CONTEXT - 1)), (1, 0), value=SEPARATOR)
    return lambda: model.patcher(read)


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
