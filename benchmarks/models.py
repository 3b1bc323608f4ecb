"""A training step of our models and of other libraries', at the same sizes, on the same batch, in one run.

python benchmarks/models.py [--quick] [--json PATH]

A MEGABYTE (patches of 8; global 512 wide, 8 layers; local 256 wide, 4 layers) and a Perceiver AR (1,024 latents, 512
wide, 8 layers) over 2 rows of 8,192 bytes: forward, backward, clipping and AdamW, in fp32 and bf16. Steps of all
contenders are taken in turn, with a product of 2048-cubed matrices between. Each is a process of its own (see
contender.py), whose peak memory counts all beyond what it has imported. Ours and each peer are measured in several
settings, of which the fastest counts for speed and the leanest for memory; after one round only each library's fastest
goes on. --quick measures one row of 2,048 bytes in the fastest precision, and one or two settings of each. bf16 is left
out where the CPU emulates it.

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

from contender import BATCH, LENGTH, QUICK_OPTION
from report import Metric, native_precisions, options, report

ROOT = Path(__file__).parents[1]
PEERS_PYTHON = ROOT / ".venv-peers/bin/python"
SIZE = 2048

OURS = {"MEGABYTE": "megabyte", "Perceiver AR": "perceiver_ar"}
OUR_SETTINGS = [[], ["recompute"], ["compile"]]
PEERS = {
    "MEGABYTE": {
        "MEGABYTE-pytorch": {"fp32": [[], ["flash"]], "bf16": [["cast"], ["cast", "flash"], ["cast", "compile"], []]},
        "mblm": {
            "fp32": [["flash"], [], ["flash", "recompute"]],
            "bf16": [["cast", "flash"], ["cast"], ["cast", "compile"], ["flash"], ["cast", "flash", "recompute"]],
        },
    },
    # It cannot run under autocast: what it masks with overflows bf16.
    "Perceiver AR": {"perceiver-ar-pytorch": {"fp32": [[]], "bf16": [["cast"], ["cast", "compile"]]}},
}
"""Of each family, other libraries with their settings; --quick has the first of each, and our first two."""
ROUNDS = 4


class Contender:
    """A process that takes a step when asked."""

    def __init__(self, name: str, precision: str, settings: list[str], python: Path) -> None:
        self.seconds: list[float] = []
        self.peak_bytes = 0
        command = [str(python), str(Path(__file__).with_name("contender.py")), name, precision, *settings]
        if QUICK_OPTION in sys.argv:
            command.append(QUICK_OPTION)
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
    precisions = native_precisions()
    for precision in precisions[-1:] if chosen.quick else precisions:
        for family in OURS:
            metrics += measure(family, precision, chosen.quick)
            report("A training step", metrics, chosen.json)


def measure(family: str, precision: str, quick: bool) -> list[Metric]:
    title = f"{family}, {precision}"
    with ExitStack() as stack:

        def begun(name: str, settings: list[str], python: Path) -> tuple[Contender, dict[str, Any]] | None:
            contender = stack.enter_context(Contender(name, precision, settings, python))
            facts = contender.facts()
            return None if facts is None else (contender, facts)

        ours: dict[str, Contender] = {}
        for settings in OUR_SETTINGS[: 2 if quick else None]:
            own = begun(OURS[family], settings, Path(sys.executable))
            assert own is not None
            ours[" ".join(["ours", *settings])], facts = own
        peers: dict[str, Contender] = {}
        what, missing = dict.fromkeys(ours, f"{facts['parameters']:,} parameters"), []
        for name, choices in PEERS[family].items():
            for settings in choices[precision][: 1 if quick else None]:
                peer = begun(name, settings, PEERS_PYTHON) if PEERS_PYTHON.exists() else None
                if peer is None:
                    missing.append(Metric(f"{title}: {name}", float("nan"), "kB/s", "missing; see the docstring"))
                    break
                label = " ".join([name, peer[1]["version"], *settings])
                peers[label], what[label] = peer[0], f"{peer[1]['parameters']:,} parameters"
        everyone = ours | peers
        square = torch.randn(SIZE, SIZE, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
        products = [product(square)]
        for one in everyone.values():  # the first step compiles kernels and allocates
            one.step()
            one.seconds.clear()
        taking = list(everyone)
        for _ in range(1 if quick else ROUNDS):
            for name in taking:
                products += [product(square) for _ in range(6)]
                everyone[name].step()
            # A label begins with its library.
            taking = [
                min((name for name in taking if name.split()[0] == library), key=lambda name: everyone[name].seconds[0])
                for library in dict.fromkeys(name.split()[0] for name in taking)
            ]
    peak = 2 * SIZE**3 / statistics.median(products)
    seconds = {name: statistics.median(one.seconds) for name, one in everyone.items()}
    memory = {name: one.peak_bytes for name, one in everyone.items()}
    fastest, leanest = min(ours, key=seconds.__getitem__), min(ours, key=memory.__getitem__)
    metrics = [
        *(
            Metric(
                f"{title}: {name}",
                BATCH * LENGTH / seconds[name] / 1e3,
                "kB/s",
                f"{memory[name] / 2**20:.0f} MiB beyond what is imported; {what[name]}",
            )
            for name in everyone
        ),
        *missing,
        Metric(
            f"{title}: MFU",
            facts["flops"] / seconds[fastest] / peak,
            "",
            f"{fastest}; of {peak / 1e9:.0f} GFLOP/s, a {SIZE}-cubed product",
            goal=0.5,
        ),
    ]
    if peers:
        best, least = min(peers, key=seconds.__getitem__), min(peers, key=memory.__getitem__)
        speed = Metric(f"{title}: speed", seconds[best] / seconds[fastest], "times", f"{fastest} / {best}", goal=2.5)
        lean = memory[leanest] / memory[least]
        metrics += [
            speed,
            Metric(f"{title}: memory", lean, "times", f"{leanest} / {least}", goal=0.5, better="lower"),
        ]
    return metrics


def product(square: torch.Tensor) -> float:
    """Seconds of a matrix product."""
    start = time.perf_counter()
    torch.mm(square, square)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
