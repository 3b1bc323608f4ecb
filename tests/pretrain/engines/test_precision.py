"""Choice of a precision, measured peaks, and MFU."""

import json
import subprocess
import time
from pathlib import Path

import pytest
import torch

from pretrain.engines import RankStep, StepResult, choose_precision, has_native_bf16, scoring_precision
from pretrain.engines.peak import peak_flops
from pretrain.engines.precision import BUDGET_SECONDS, NATIVE_SPEEDUP, SIZES, bf16_speedup
from pretrain.training.meter import Meter
from tests.emulation import EMULATIONS, NO_ONEDNN, OLDER, is_slow

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", [OLDER, pytest.param(NO_ONEDNN, marks=pytest.mark.long)])
def test_emulated_bf16_is_measured_as_slow(name: str):
    if not is_slow(name):
        pytest.skip(f"bf16 is not slow under {name} on this machine")
    code = "import torch\nfrom pretrain.engines.precision import *\n"
    code += "print(bf16_speedup(), has_native_bf16(torch.device('cpu')))"
    emulation = EMULATIONS[name]
    done = subprocess.run(
        emulation.python(code), env=emulation.environment(), capture_output=True, text=True, check=True
    )
    speedup, native = done.stdout.split()
    assert float(speedup) < NATIVE_SPEEDUP
    assert native == "False"


def test_slow_first_products_do_not_end_the_comparison_at_small_ones(monkeypatch: pytest.MonkeyPatch):
    """Libraries prepare a first product for longer than the budget. Small products are slower in bf16 anywhere."""
    multiply, sizes = torch.mm, list[int]()

    def slow_at_first(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        end = time.thread_time() + BUDGET_SECONDS * (len(a) not in sizes)
        while time.thread_time() < end:
            pass
        sizes.append(len(a))
        return multiply(a, b)

    monkeypatch.setattr(torch, "mm", slow_at_first)
    bf16_speedup.__wrapped__()
    assert max(sizes) > SIZES[0]


def test_auto_is_the_fastest_precision_unless_the_run_has_one():
    best = "bf16" if has_native_bf16(CPU) else "fp32"
    assert choose_precision("auto", CPU) == best
    for kept in ("fp32", "bf16"):
        assert choose_precision("auto", CPU, kept) == kept
        assert choose_precision(kept, CPU, "fp8") == kept
    assert scoring_precision("fp32", CPU) == "fp32"
    assert scoring_precision("auto", CPU) == scoring_precision("bf16", CPU) == best


@pytest.mark.slow
def test_measured_peak_is_cached_and_a_damaged_cache_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured, _ = peak_flops(CPU, torch.float32)
    assert peak_flops(CPU, torch.float32)[0] == measured
    path = tmp_path / "byteloom/peaks.json"
    (key,) = json.loads(path.read_text())
    for content in ("", "\0\0", "[]", json.dumps({key: -1.0}), json.dumps({key: "fast"})):
        path.write_text(content)
        assert peak_flops(CPU, torch.float32)[0] > 0
        assert json.loads(path.read_text())[key] > 0
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert peak_flops(CPU, torch.float32)[0] > 0


def test_mfu_is_never_above_one_and_absent_without_a_peak():
    rank = RankStep(nats=1.0, forward_backward=0.1, optimizer=0.1, communication=0.0, peak_memory_bytes=1)
    result = StepResult(1.0, 1, 1.0, [rank])

    def mfu(meter: Meter) -> float | None:
        meter.start()
        return meter.numbers(result, [0.0], []).get("mfu")

    assert mfu(Meter(1e12, None)) is None
    too_low = Meter(1e12, 1.0)
    assert mfu(too_low) == 1
    assert all(0 < mfu(too_low) <= 1 for _ in range(5))
    assert 0 < mfu(Meter(1.0, 1e12)) < 1
