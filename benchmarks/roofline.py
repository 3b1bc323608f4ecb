"""Tables of docs/guides/scale.md: the least time of a step and what ranks send, counted without a GPU.

python benchmarks/roofline.py [--write]

`pretrain.estimate.roofline` counts operations and bytes. The rates of GPUs and links are those of data sheets. No
number here was measured on a GPU. `--write` puts the tables into the page; a test compares them.
"""

import argparse
from functools import cache
from pathlib import Path

import yaml

from pretrain.estimate.roofline import GPUS, StepWork, measure_work
from pretrain.models import model_config

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/guides/scale.md"
CASES = (
    ("megabyte/pg19-best", 1),
    ("megabyte/pg19-best", 4),
    ("megabyte/pg19-best", 16),
    ("megabyte/text", 4),
    ("perceiver_ar/text-228m", 8),
    ("transformer/size-6.7b", 1),
    ("transformer/size-6.7b", 8),
    ("transformer_xl/enwik8-24-layers", 8),
)
SENT = (
    ("megabyte/pg19-best", 1),
    ("megabyte/pg19-best", 16),
    ("transformer/size-6.7b", 1),
    ("transformer/size-6.7b", 8),
)
NVLINK, NETWORK = 450e9, 50e9
"""Bytes a second that a GPU sends: within a node of H100 (NVLink 4), and over one 400 Gb/s port to other nodes."""
NODE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/guides/scale.md")
    if parser.parse_args().write:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(tables().values()))


def with_tables(page: str) -> str:
    """Return a page with each table between its two comments."""
    for name, table in tables().items():
        begin, end = f"<!-- roofline: {name} -->\n", "<!-- end -->"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}{table}\n{rest[rest.index(end) :]}"
    return page


@cache
def work_of(name: str, rows: int) -> StepWork:
    tree = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text(encoding="utf-8"))
    return measure_work(model_config(tree["model"]), rows)


def tables() -> dict[str, str]:
    """Return the tables in Markdown, by name."""
    return {"steps": table_of_steps(), "sent": table_of_sent()}


def table_of_steps() -> str:
    """Return what a step of one micro-batch takes at least."""
    head = ["recipe", "micro-batch", "TFLOP", "GB moved", "FLOP a byte", "kernels"]
    for name in GPUS:
        head += [f"{name}: ms", "MFU", "MFU, merged"]
    lines = []
    for name, rows in CASES:
        work = work_of(name, rows)
        line = [f"`{name}`", str(rows), f"{work.flops / 1e12:.1f}", f"{work.bytes / 1e9:.0f}"]
        line += [f"{work.flops / work.bytes:.0f}", f"{len(work.kernels):,}"]
        for gpu in GPUS.values():
            line += [f"{work.seconds(gpu) * 1e3:.0f}", f"{work.mfu(gpu):.2f}", f"{work.mfu(gpu, merged=True):.2f}"]
        lines.append(line)
    return markdown(head, lines)


def table_of_sent() -> str:
    """Return what a rank sends in a step of one micro-batch, and how long that takes at least."""
    head = ["recipe", "micro-batch", "step on H100, ms", "`ddp`, `fsdp`: GB", "ms", "`hsdp`: GB in the node", "ms"]
    head += ["GB between nodes", "ms"]
    lines = []
    for name, rows in SENT:
        work = work_of(name, rows)
        everywhere = 8 * work.parameters  # ddp: 2 x 4 for gradients; fsdp: 4 for gradients, 2 x 2 for weights
        between = 2 * 4 * work.parameters / NODE
        line = [f"`{name}`", str(rows), f"{work.seconds(GPUS['H100']) * 1e3:.0f}"]
        for size, rate in ((everywhere, NETWORK), (everywhere, NVLINK), (between, NETWORK)):
            line += [f"{size / 1e9:.1f}", f"{size / rate * 1e3:.0f}"]
        lines.append(line)
    return markdown(head, lines)


def markdown(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
