"""A training step of our models and of other libraries', at the same sizes, on the same batch, in one run.

python benchmarks/models.py [--quick] [--json PATH]

A MEGABYTE (patches of 8; global 512 wide, 8 layers; local 256 wide, 4 layers) and a Perceiver AR (1,024 latents, 512
wide, 8 layers) over 2 rows of 8,192 bytes: forward, backward, clipping and AdamW, in fp32 and bf16. Steps of all
contenders are taken in turn, with a product of 2048-cubed matrices between. Each is a process of its own (see
contender.py), whose peak memory counts all beyond what it has imported. Each peer is
measured in several settings, of which the fastest counts. --quick measures bf16 alone, and one setting each.

The peers are in a virtual environment of their own; a missing one is named in the table. mblm is installed without what
it asks for beside its models:

    python -m venv .venv-peers
    .venv-peers/bin/pip install torch==2.13.0 numpy einops tqdm packaging pydantic pyyaml pillow beartype
    .venv-peers/bin/pip install --no-deps MEGABYTE-pytorch==0.3.6 mblm==0.4.2 mambapy perceiver-ar-pytorch==0.0.10
"""

import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch

from contender import BATCH, LENGTH
from report import Metric, options, report

ROOT = Path(__file__).parents[1]
PEERS_PYTHON = ROOT / ".venv-peers/bin/python"
SIZE = 2048

OURS = {"MEGABYTE": "megabyte", "Perceiver AR": "perceiver_ar"}
PEERS = {
    "MEGABYTE": {
        "MEGABYTE-pytorch": {"fp32": [[], ["flash"]], "bf16": [["cast"], ["cast", "flash"], []]},
        "mblm": {"fp32": [["flash"], []], "bf16": [["cast", "flash"], ["cast"], ["flash"]]},
    },
    "Perceiver AR": {"perceiver-ar-pytorch": {"fp32": [[]], "bf16": [["cast"], []]}},
}
"""Of each family, other libraries with their settings; --quick has the first of each."""


class Contender:
    """A process that takes a step when asked."""

    def __init__(self, name: str, precision: str, settings: list[str], python: Path) -> None:
        self.seconds: list[float] = []
        self.peak_bytes = 0
        command = [str(python), str(Path(__file__).with_name("contender.py")), name, precision, *settings]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: object) -> None:
        self._process.communicate()

    def facts(self) -> dict[str, Any] | None:
        """What it says of itself when it is ready; None: it could not begin."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else None

    def step(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        self.seconds.append(answer["seconds"])
        self.peak_bytes = answer["peak_bytes"]


def main() -> None:
    chosen = options(__doc__)
    metrics = []
    for precision in ("bf16",) if chosen.quick else ("fp32", "bf16"):
        for family in OURS:
            metrics += measure(family, precision, chosen.quick)
    report("A training step", metrics, chosen.json)


def measure(family: str, precision: str, quick: bool) -> list[Metric]:
    title = f"{family}, {precision}"
    with ExitStack() as stack:
        ours = stack.enter_context(Contender(OURS[family], precision, [], Path(sys.executable)))
        facts = ours.facts()
        assert facts is not None
        peers, missing = {}, []
        for name, choices in PEERS[family].items():
            for settings in choices[precision][: 1 if quick else None]:
                said = None
                if PEERS_PYTHON.exists():
                    peer = stack.enter_context(Contender(name, precision, settings, PEERS_PYTHON))
                    said = peer.facts()
                if said is None:
                    missing.append(Metric(f"{title}: {name}", float("nan"), "kB/s", "missing; see the docstring"))
                    break
                label = " ".join([name, said["version"], *settings])
                peers[label] = (peer, f"{said['parameters']:,} parameters")
        everyone = [ours, *(peer for peer, _ in peers.values())]
        square = torch.randn(SIZE, SIZE, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
        products = [product(square)]
        for one in everyone:  # the first step compiles kernels and allocates
            one.step()
            one.seconds.clear()
        for _ in range(1 if quick else 3):
            for one in everyone:
                products += [product(square) for _ in range(6)]
                one.step()
    peak = 2 * SIZE**3 / statistics.median(products)
    rate = BATCH * LENGTH / statistics.median(ours.seconds)
    mfu = facts["flops"] / statistics.median(ours.seconds) / peak
    rates = {name: BATCH * LENGTH / statistics.median(peer.seconds) for name, (peer, _) in peers.items()}
    metrics = [
        Metric(f"{title}: ours", rate / 1e3, "kB/s", f"{facts['parameters']:,} parameters"),
        *(Metric(f"{title}: {name}", rates[name] / 1e3, "kB/s", what) for name, (_, what) in peers.items()),
        *missing,
        Metric(f"{title}: MFU", mfu, "", f"of {peak / 1e9:.0f} GFLOP/s, a {SIZE}-cubed product", goal=0.5),
        Metric(f"{title}: peak memory", ours.peak_bytes / 2**20, "MiB", "beyond what is imported"),
    ]
    if peers:
        best = max(rates, key=rates.__getitem__)
        least = min(peers, key=lambda name: peers[name][0].peak_bytes)
        lean = peers[least][0].peak_bytes
        metrics += [
            Metric(f"{title}: ours / best peer", rate / rates[best], "", best, goal=2.5),
            Metric(
                f"{title}: memory / leanest peer",
                ours.peak_bytes / lean,
                "",
                f"{least}: {lean / 2**20:.0f} MiB",
                goal=0.5,
                better="lower",
            ),
        ]
    return metrics


def product(square: torch.Tensor) -> float:
    """Seconds of a matrix product."""
    start = time.perf_counter()
    torch.mm(square, square)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
