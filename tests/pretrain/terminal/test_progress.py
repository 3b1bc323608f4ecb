"""Progress display of long work at each width, with and without a terminal."""

import io
import re
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from rich.console import Console

from pretrain.terminal import progress
from pretrain.terminal.progress import Display, Row, TrainingProgress, WorkProgress

METRICS = {
    "train/bits_per_byte": 1.23456,
    "bytes_per_second": 123_456.0,
    "data_wait_share": 0.001,
    "mfu": 0.43,
    "peak_memory_bytes": 1.2e9,
}
WIDTHS = (40, 60, 80, 120)


def terminal(width: int = 80) -> Console:
    return Console(width=width, force_terminal=True, file=io.StringIO(), color_system=None, legacy_windows=False)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def line_of(row: Row, width: int) -> str:
    """Return the line that a terminal of a width shows for a row."""
    console = terminal(width)
    console.print(row.line(console.options), end="")
    assert "\n" not in text_of(console)
    return text_of(console)


def trained(**metrics: float) -> TrainingProgress:
    row = TrainingProgress(Display(Console(quiet=True)), 100_000, 0)
    row.update(1234, METRICS | metrics, 3723.0)
    return row


def test_training_line_drops_fields_by_width_but_keeps_the_step_and_the_time_left():
    assert [line_of(trained(), width) for width in WIDTHS] == [
        "1234/100000 1.2346 bits/byte 1h02m left",
        "1234/100000 1.2346 bits/byte 123 kB/s MFU 0.43 1h02m left",
        "1234/100000 1.2346 bits/byte 123 kB/s wait 0.1% MFU 0.43 mem 1.2 GB 1h02m left",
        "1234/100000 ──────────────────── 1.2346 bits/byte 123 kB/s wait 0.1% MFU 0.43 mem 1.2 GB 1h02m left",
    ]
    for width in range(24, 140):
        line = line_of(trained(), width)
        assert len(line) <= width
        assert "1234/100000" in line and "1h02m left" in line


def test_run_without_mfu_shows_no_mfu():
    row = TrainingProgress(Display(Console(quiet=True)), 10, 0)
    row.update(1, {name: value for name, value in METRICS.items() if name != "mfu"}, 5.0)
    assert line_of(row, 79) == "1/10 1.2346 bits/byte 123 kB/s wait 0.1% mem 1.2 GB 5s left"


def test_phase_drops_fields_by_width_but_keeps_its_name_and_the_time(monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now))
    phase = WorkProgress("validating", 10_000.0)
    counted = WorkProgress("rehearsing a micro-batch")
    phase.advance(5_000.0)
    now = 75.0
    assert [line_of(phase, width) for width in WIDTHS] == [
        "validating 50% of 10 kB 1m15s left",
        "validating 50% of 10 kB 67 B/s 1m15s left",
        "validating ━━━━━━━━━━────────── 50% of 10 kB 67 B/s 1m15s left",
        "validating ━━━━━━━━━━────────── 50% of 10 kB 67 B/s 1m15s left",
    ]
    assert line_of(counted, 40).endswith(" 1m15s so far")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_quick_work_shows_nothing():
    console = terminal()
    with Display(console).phase("quick"):
        pass
    assert text_of(console) == ""


def test_phase_is_shown_below_its_run(monkeypatch: pytest.MonkeyPatch):
    """The library rich supports only one live area, which therefore holds both."""
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    console = terminal()
    display = Display(console)
    with TrainingProgress(display, 10, 3), display.phase("validating", 100.0) as phase:
        phase.advance(50.0)
        wait_until(lambda: re.search("3/10[^\n]*\nvalidating ━", text_of(console)) is not None)
    shown = text_of(console)
    after = shown[shown.rindex("3/10") :]
    assert "validating" not in after
    assert after.endswith("\x1b[?25h"), "the cursor is shown again"


def test_phase_without_a_terminal_is_a_plain_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    console = Console(width=20, file=io.StringIO())
    with Display(console).phase("loading the checkpoint") as phase:
        wait_until(lambda: text_of(console).endswith("\n"))
        phase.update(50, 100)
        assert phase.plain_line().startswith("loading the checkpoint: 50% of 100 B")
    assert re.fullmatch(r"loading the checkpoint: \d+s so far\n", text_of(console))


def test_closed_display_restores_the_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    console = terminal()
    display = Display(console)
    with display.phase("rehearsing"):
        wait_until(lambda: "rehearsing" in text_of(console))
        display.close()
        closed = text_of(console)
        assert "\x1b[?25h" in closed
        with display.phase("later"):
            pass
    assert text_of(console) == closed
