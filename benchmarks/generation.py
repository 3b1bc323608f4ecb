"""Generation of 8,192 bytes: MEGABYTE against a Transformer with a quarter of its parameters, and caches against none.

The two models are those of the paper (arXiv:2305.07185, table 9: 132 s and 93 s), with all widths divided by
WIDTH_DIVISOR. The Transformer's context is 1,024 bytes, as in the paper: when it is full, the model reads its last half
again. A third model is that Transformer with a context of all 8,192 bytes. The times include sampling.

Without caches, every byte needs a forward pass over all bytes before it. The total cost is estimated from passes at a
few lengths: the sum over all lengths, interpolated linearly between the measured ones.

Self-speculation needs a trained model: a small Transformer with 8 heads learns Python's standard library for some
minutes, and continues files that it has not seen, with and without speculation.

python benchmarks/generation.py [--quick] [--json PATH]
"""

import statistics
import sysconfig
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common.report import Metric, options, report
from data_pipeline.vocabulary import SEPARATOR
from pretrain.evaluation.generation import Sampling, generate_rows
from pretrain.evaluation.speculation import Speculation, speculate_rows
from pretrain.models import build_model, model_config
from pretrain.models.base import ByteModel
from pretrain.models.families.megabyte import Megabyte, MegabyteConfig
from pretrain.models.families.transformer import Transformer, TransformerConfig

WIDTH_DIVISOR = 8
LENGTH, CONTEXT = 8192, 1024
HEADS = 2
FORESEEING = {
    "family": "transformer",
    "sequence_length": 256,
    "width": 128,
    "layers": 4,
    "heads": 4,
    "dropout": 0.0,
    "initial_std": 0.02,
    "multi_byte": {"heads": 8},
}
"""Model that speculates."""
ROWS, TRAINING_STEPS = 8, 1000


def width(paper_width: int) -> int:
    return paper_width // WIDTH_DIVISOR


def megabyte() -> Megabyte:
    """Return the paper's model of 1.3B + 218M: 24 layers of 2,048, 15 of 1,024, patches of 8."""
    sizes = {
        "sequence_length": LENGTH,
        "patch_size": 8,
        "global_model": {"width": width(2048), "layers": 24, "heads": 2 * HEADS},
        "local_model": {"width": width(1024), "layers": 15, "heads": HEADS},
    }
    return Megabyte(MegabyteConfig.model_validate(sizes))


def transformer(context: int = CONTEXT) -> Transformer:
    """Return the paper's model of 350M: 24 layers of 1,024, with learned positions, as in MEGABYTE."""
    sizes = {"width": width(1024), "layers": 24, "heads": HEADS, "positions": "learned"}
    return Transformer(TransformerConfig.model_validate({"sequence_length": context, **sizes}))


def build(make: Callable[[], ByteModel]) -> ByteModel:
    """Build a model that never ends a document: a separator's logit is 0, and sampling draws from the top 50 ids."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        table = model.local_embedding if isinstance(model, Megabyte) else model.embedding
        table.weight[SEPARATOR] = 0
    return model


def side_by_side(models: dict[str, ByteModel], rows: int, count: int, chunk: int) -> dict[str, float]:
    """Return the seconds in which each model generates `count` bytes in each row. Models alternate after each chunk."""
    prompts, counts = [b""] * rows, [count] * rows
    writers = {name: generate_rows(model, prompts, counts, Sampling(top_k=50)) for name, model in models.items()}
    seconds = dict.fromkeys(models, 0.0)
    for _ in range(count // chunk):
        for name, writer in writers.items():
            start = time.perf_counter()
            written = sum(1 for _ in zip(range(rows * chunk), writer, strict=False))
            seconds[name] += time.perf_counter() - start
            assert written == rows * chunk
    return seconds


@torch.no_grad()
def seconds_without_caches(model: ByteModel, count: int, rounds: int) -> float:
    """Estimate the seconds to generate `count` bytes with one forward pass each, in `generate_rows`' context."""
    T = model.sequence_length
    lengths = [1, *(T * part // 8 for part in (1, 2, 4, 6, 8))]
    costs = []
    for length in lengths:
        ids, times = torch.zeros(1, length, dtype=torch.long), []
        for _ in range(rounds):
            start = time.perf_counter()
            model(ids)
            times.append(time.perf_counter() - start)
        costs.append(statistics.median(times))
    held = np.arange(count)
    in_context = np.where(held < T, held, T // 2 + (held - T) % (T - T // 2)) + 1
    return float(np.interp(in_context, lengths, costs).sum())


def trained(steps: int) -> tuple[ByteModel, bytes]:
    """Return a model that learned the files of Python's standard library, and files that it has not seen."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8)
    seen = text[: len(text) * 19 // 20]
    torch.manual_seed(0)
    model = build_model(model_config(FORESEEING)).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 50) * (1 - step / steps)
        first = torch.randint(len(seen) - model.sequence_length, (ROWS,))
        rows = torch.stack([seen[begin : begin + model.sequence_length] for begin in first.tolist()])
        optimizer.zero_grad()
        model(rows.long()).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval(), bytes(text[len(seen) :].tolist())


def speculation_metrics(quick: bool) -> list[Metric]:
    """Return the speed with and without speculation. They take turns, a prompt each; both must write the same bytes."""
    model, unseen = trained(20 if quick else TRAINING_STEPS)
    prompts, count = (2, 60) if quick else (8, 300)
    metrics = []
    for name, sampling in (
        ("temperature 0", Sampling(temperature=0, separators=False)),
        ("temperature 0.8", Sampling(temperature=0.8, separators=False)),
    ):
        speculation, seconds, equal = Speculation(), {False: 0.0, True: 0.0}, 0
        for begin in range(0, len(unseen) - 128, (len(unseen) - 128) // prompts)[:prompts]:
            prompt, written = [unseen[begin : begin + 128]], []
            for speculates in seconds:
                start = time.perf_counter()
                drawn = (
                    speculate_rows(model, prompt, [count], sampling, speculation)
                    if speculates
                    else generate_rows(model, prompt, [count], sampling)
                )
                written.append(list(drawn))
                seconds[speculates] += time.perf_counter() - start
            equal += written[0] == written[1]
        passes = f"{speculation.drawn / speculation.passes:.2f} bytes a pass; {equal} of {prompts} texts are the same"
        metrics.append(Metric(f"speculated / plain, {name}", seconds[False] / seconds[True], "", passes))
    return metrics


def main() -> None:
    chosen = options(__doc__)
    count, chunk = (512, 128) if chosen.quick else (LENGTH, CONTEXT)
    models = {
        "MEGABYTE": build(megabyte),
        "Transformer": build(transformer),
        f"Transformer, context {LENGTH:,}": build(partial(transformer, LENGTH)),
    }
    side_by_side(models, rows=1, count=32, chunk=32)
    seconds = side_by_side(models, 1, count, chunk)
    sizes = {name: model.parameter_count() for name, model in models.items()}
    metrics = [
        Metric(f"{name}, {count:,} bytes", count / seconds[name], "bytes/s", f"{sizes[name]:,} parameters")
        for name in models
    ]
    faster = seconds["Transformer"] / seconds["MEGABYTE"]
    larger = sizes["MEGABYTE"] / sizes["Transformer"]
    metrics.append(Metric("MEGABYTE / Transformer", faster, "", f"with {larger:.1f} times its parameters", goal=1.4))
    for name, model in models.items():
        without = seconds_without_caches(model, count, rounds=1 if chosen.quick else 3)
        detail = f"without: {count / without:.3g} bytes/s, estimated from 6 lengths"
        metrics.append(Metric(f"{name}, with caches / without", without / seconds[name], "", detail, goal=20))
    rows, some = 16, chunk // 4
    batched = side_by_side(models, rows, some, some)
    for name in models:
        detail = f"{some} bytes in each of {rows} rows at once"
        metrics.append(Metric(f"{name}, {rows} rows", rows * some / batched[name], "bytes/s", detail))
    metrics += speculation_metrics(chosen.quick)
    report("Generation", metrics, chosen.json)


if __name__ == "__main__":
    main()
