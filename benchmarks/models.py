"""A training step of our models and of other libraries' models, with the same sizes and the same batch.

python benchmarks/models.py [--quick] [--json PATH]

The models are a MEGABYTE (patches of 8; global 512 wide, 8 layers; local 256 wide, 4 layers) and a Perceiver AR (1,024
latents, 512 wide, 8 layers). Without --quick, the Perceiver AR is measured once more with dropped inputs. A step over 2
rows of 8,192 bytes is forward, backward, clipping and AdamW, in fp32 and in bf16. The contenders take steps in turn,
with a product of 2048-cubed matrices before each. Each contender is a process (see common/contender.py). Its peak
memory excludes its imports. Ours and each peer are measured in several settings. The fastest setting counts for speed
and the leanest for memory. After one round only the fastest setting of each library continues. --quick measures one row
of 2,048 bytes in the fastest precision, and one or two settings of each. bf16 is skipped if the CPU emulates it.

The peers have their own virtual environment. The table names a missing peer. mblm is installed without the dependencies
that its models do not need:

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

from common.contender import BATCH, LENGTH, QUICK_OPTION
from common.report import Metric, native_precisions, options, report

ROOT = Path(__file__).parents[1]
PEERS_PYTHON = ROOT / ".venv-peers/bin/python"
SIZE = 2048

OURS = {
    "MEGABYTE": ["megabyte"],
    "Perceiver AR": ["perceiver_ar"],
    "Perceiver AR, 7/8 of inputs dropped": ["perceiver_ar", "drop"],
}
"""Name of our contender and the settings of each of its processes, by family."""
OUR_SETTINGS = [[], ["recompute"], ["compile"]]
PEERS = {
    "MEGABYTE": {
        "MEGABYTE-pytorch": {"fp32": [[], ["flash"]], "bf16": [["cast"], ["cast", "flash"], ["cast", "compile"], []]},
        "mblm": {
            "fp32": [["flash"], [], ["flash", "recompute"]],
            "bf16": [["cast", "flash"], ["cast"], ["cast", "compile"], ["flash"], ["cast", "flash", "recompute"]],
        },
    },
    # It cannot run under autocast: its mask value overflows bf16.
    "Perceiver AR": {"perceiver-ar-pytorch": {"fp32": [[]], "bf16": [["cast"], ["cast", "compile"]]}},
}
"""Other libraries and their settings, by family. --quick measures the first setting of each, and our first two."""
ROUNDS = 4


class Contender:
    """Process that takes a step on request."""

    def __init__(self, name: str, precision: str, settings: list[str], python: Path) -> None:
        self.seconds: list[float] = []
        self.peak_bytes = 0
        command = [str(python), str(Path(__file__).with_name("common") / "contender.py"), name, precision, *settings]
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
        """Return the facts that the process reports when it is ready, or None if it could not start."""
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
        for family in list(PEERS) if chosen.quick else OURS:
            metrics += measure(family, precision, chosen.quick)
            report("A training step", metrics, chosen.json)


def measure(family: str, precision: str, quick: bool) -> list[Metric]:
    title = f"{family}, {precision}"
    with ExitStack() as stack:

        def start(name: str, settings: list[str], python: Path) -> tuple[Contender, dict[str, Any]] | None:
            contender = stack.enter_context(Contender(name, precision, settings, python))
            facts = contender.facts()
            return None if facts is None else (contender, facts)

        ours: dict[str, Contender] = {}
        for settings in OUR_SETTINGS[: 2 if quick else None]:
            name, *common = OURS[family]
            own = start(name, [*common, *settings], Path(sys.executable))
            assert own is not None
            ours[" ".join(["ours", *settings])], facts = own
        peers: dict[str, Contender] = {}
        sizes, missing = dict.fromkeys(ours, f"{facts['parameters']:,} parameters"), []
        for name, choices in PEERS.get(family, {}).items():
            for settings in choices[precision][: 1 if quick else None]:
                peer = start(name, settings, PEERS_PYTHON) if PEERS_PYTHON.exists() else None
                if peer is None:
                    missing.append(Metric(f"{title}: {name}", float("nan"), "kB/s", "missing; see the docstring"))
                    break
                label = " ".join([name, peer[1]["version"], *settings])
                peers[label], sizes[label] = peer[0], f"{peer[1]['parameters']:,} parameters"
        everyone = ours | peers
        square = torch.randn(SIZE, SIZE, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
        products = [product(square)]
        for contender in everyone.values():  # the first step compiles kernels and allocates
            contender.step()
            contender.seconds.clear()
        active = list(everyone)
        for _ in range(1 if quick else ROUNDS):
            for name in active:
                products += [product(square) for _ in range(6)]
                everyone[name].step()
            # The first word of a label is its library.
            active = [
                min((name for name in active if name.split()[0] == library), key=lambda name: everyone[name].seconds[0])
                for library in dict.fromkeys(name.split()[0] for name in active)
            ]
    peak = 2 * SIZE**3 / statistics.median(products)
    seconds = {name: statistics.median(contender.seconds) for name, contender in everyone.items()}
    memory = {name: contender.peak_bytes for name, contender in everyone.items()}
    fastest, leanest = min(ours, key=seconds.__getitem__), min(ours, key=memory.__getitem__)
    metrics = [
        *(
            Metric(
                f"{title}: {name}",
                BATCH * LENGTH / seconds[name] / 1e3,
                "kB/s",
                f"{memory[name] / 2**20:.0f} MiB without imports; {sizes[name]}",
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
    """Return the seconds of a matrix product."""
    start = time.perf_counter()
    torch.mm(square, square)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
