"""What a person sees while a run goes on: a live line on a terminal, a plain line now and then elsewhere."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

PLAIN_LINE_SECONDS = 10.0
BAR_CONSOLE_WIDTH = 110


class TrainingProgress:
    """Shows step, bits per byte, bytes/s, data-wait share, MFU, memory and time left.

    Args:
        console: where to write; a live line when it is a terminal.
        steps: of the whole run.
        first_step: steps done before this start.
    """

    def __init__(self, console: Console, steps: int, first_step: int) -> None:
        self._console = console
        self._steps = steps
        self._last_line = float("-inf")
        self._live = Progress(
            MofNCompleteColumn(),
            *([BarColumn(bar_width=20)] if console.width >= BAR_CONSOLE_WIDTH else []),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID = self._live.add_task("", total=steps, completed=first_step)

    def update(self, step: int, metrics: Mapping[str, float], seconds_left: float) -> str | None:
        """Shows the state after `step`; returns the line to log when one is due."""
        parts = [*describe(metrics), f"{duration(seconds_left)} left"]
        self._live.update(self._task, completed=step, description=" ".join(parts))
        now = time.monotonic()
        due = now - self._last_line >= PLAIN_LINE_SECONDS or step == self._steps
        if not due:
            return None
        self._last_line = now
        line = "  ".join([f"step {step}/{self._steps}", *parts])
        if not self._console.is_terminal:
            self._console.print(line, highlight=False, soft_wrap=True)
        return line

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()


def describe(metrics: Mapping[str, float]) -> list[str]:
    """One step's numbers in words; with step and time left they fit a terminal of 80 columns."""
    return [
        f"{metrics['train/bits_per_byte']:.4f} bits/byte",
        f"{size(metrics['bytes_per_second'])}/s",
        f"wait {metrics['data_wait_share']:.1%}",
        *([f"MFU {metrics['mfu']:.2f}"] if "mfu" in metrics else []),
        f"mem {size(metrics['peak_memory_bytes'])}",
    ]


def size(count: float) -> str:
    """Bytes for people: 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """Seconds for people: 1h02m, 3m20s, 12s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
