"""Progress of long work: a live line on a terminal; plain lines in files and in the log.

    Display ─┬─ TrainingProgress   12/1000 ━━━ 1.2345 bits/byte … 3m20s left       the run
             └─ WorkProgress              validating ━━━ 41% of 12 MB, 1.2 MB/s 6s left   work of more than 3 s

rich supports one live area at a time. The display owns it and shows a validation below the run that it belongs to.
"""

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from pretrain.terminal.losses import BITS_PER_BYTE, loss_at, unit_of

QUIET_SECONDS = 3.0
"""Shortest time, in seconds, of work that is shown."""
PLAIN_LINE_SECONDS = 30.0
"""Seconds between two plain lines of a phase."""
TRAINING_LINE_SECONDS = 10.0
"""Seconds between two plain lines of training."""
BAR_WIDTH = 20
SPINNER = "|/-\\"
PICTURE_RANK = 9
"""Rank of a bar or spinner among the fields of a live line."""

log = logging.getLogger(__name__)


class Row(Protocol):
    """A line of the live area."""

    stays: bool
    """Whether the line stays on the terminal after its work has ended."""

    def line(self, options: ConsoleOptions) -> Text:
        """Return the current line, no wider than the terminal if possible."""


class Display:
    """Live area of a terminal with a row for each work in progress; without a terminal, plain lines."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._rows: list[Row] = []
        self._live: Live | None = None
        self._is_closed = False

    def log_line(self, line: str) -> None:
        """Log a line, and print it if there is no terminal."""
        log.debug(line)
        if not self._console.is_terminal and not self._is_closed:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def phase(self, what: str, total: float | None = None) -> Iterator["WorkProgress"]:
        """Show the progress of work.

        Args:
            what: the work, such as "rehearsing a micro-batch".
            total: bytes of the work, if known.
        """
        phase = WorkProgress(what, total)
        done = threading.Event()
        thread = threading.Thread(target=self._watch, args=(phase, done), name="progress", daemon=True)
        thread.start()
        try:
            yield phase
        finally:
            done.set()
            thread.join()

    def _watch(self, phase: "WorkProgress", done: threading.Event) -> None:
        if done.wait(QUIET_SECONDS):
            return
        with self.showing(phase):
            while True:
                self.log_line(phase.plain_line())
                if done.wait(PLAIN_LINE_SECONDS):
                    return

    @contextmanager
    def showing(self, row: Row) -> Iterator[None]:
        """Show a row while the context is active."""
        with self._lock:
            self._rows.append(row)
            if self._live is None and self._console.is_terminal and not self._is_closed:
                self._live = Live(self, console=self._console)
                self._live.start()
        try:
            yield
        finally:
            with self._lock:
                if len(self._rows) == 1:
                    self._stop(transient=not row.stays)
                self._rows.remove(row)

    def close(self) -> None:
        """Stop showing progress, and restore the terminal."""
        with self._lock:
            self._is_closed = True
            self._stop(transient=not any(row.stays for row in self._rows))

    def _stop(self, *, transient: bool) -> None:
        if self._live is not None:
            self._live.transient = transient
            self._live.stop()
            self._live = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # rich holds its own lock here; acquiring ours could deadlock.
        for row in tuple(self._rows):
            yield row.line(options)


class WorkProgress:
    """Progress of a phase of work: its share, speed and time left.

    Args:
        what: the work.
        total: bytes of the work, if known.
    """

    stays = False

    def __init__(self, what: str, total: float | None = None) -> None:
        self._what = what
        self._total = total
        self._done = 0.0
        self._first: float | None = None
        """Bytes done at the first report, which earlier starts did."""
        self._begin = time.monotonic()

    def update(self, done: float, total: float) -> None:
        """Report the bytes done and the bytes in total."""
        self._done, self._total = done, total
        if self._first is None:
            self._first = done

    def advance(self, count: float) -> None:
        """Report that more bytes are done."""
        self._first = self._first or 0.0
        self._done += count

    def plain_line(self) -> str:
        """Return the progress as a line for logs."""
        return f"{self._what}: {', '.join(self._figures())}"

    def _figures(self) -> list[str]:
        """Return share, speed and time left, or the time taken if no bytes were reported."""
        seconds = time.monotonic() - self._begin
        if not self._total or self._first is None:
            return [f"{duration(seconds)} so far"]
        speed = (self._done - self._first) / seconds
        figures = [f"{min(self._done / self._total, 1):.0%} of {size(self._total)}"]
        if speed > 0:
            figures += [f"{size(speed)}/s", f"{duration(max(self._total - self._done, 0) / speed)} left"]
        return figures

    def line(self, options: ConsoleOptions) -> Text:
        """Return the current line, no wider than the terminal if possible."""
        *others, last = self._figures()
        fields = [Field(0, self._what), *(Field(1 + n, text) for n, text in enumerate(others)), Field(0, last)]
        if self._total and self._first is not None:
            return _line(fields, _bar(self._done / self._total, options), options)
        return _line(fields, Text(SPINNER[int(4 * time.monotonic()) % len(SPINNER)]), options)


class TrainingProgress:
    """Progress of training: step, bits per byte, bytes/s, data wait, MFU, memory and time left.

    Args:
        display: shows the progress.
        steps: steps of the whole run.
        first_step: steps done before this start.
    """

    stays = True

    def __init__(self, display: Display, steps: int, first_step: int) -> None:
        self._display = display
        self._steps = steps
        self._step = first_step
        self._fields: list[Field] = []
        self._last_line = float("-inf")
        self._shown = display.showing(self)

    def update(self, step: int, metrics: Mapping[str, float], seconds_left: float) -> None:
        """Show the state after a step, and print a plain line if one is due."""
        self._step = step
        self._fields = [*describe(metrics), Field(0, f"{duration(seconds_left)} left")]
        now = time.monotonic()
        if now - self._last_line >= TRAINING_LINE_SECONDS or step == self._steps:
            self._last_line = now
            self._display.log_line("  ".join([f"step {step}/{self._steps}", *(field.text for field in self._fields)]))

    def line(self, options: ConsoleOptions) -> Text:
        """Return the current line, no wider than the terminal if possible."""
        step = Field(0, f"{self._step}/{self._steps}")
        return _line([step, *self._fields], _bar(self._step / self._steps, options), options)

    def __enter__(self) -> Self:
        self._shown.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shown.__exit__(kind, error, trace)


class Field(NamedTuple):
    """A part of a live line."""

    rank: int
    """Order of dropping on a narrow terminal: the highest rank first, rank 0 never."""
    text: str


def describe(metrics: Mapping[str, float]) -> list[Field]:
    """Return the metrics of a step as fields; with the step and the time left, they fit 80 columns."""
    loss = loss_at("train", metrics) or f"train/{BITS_PER_BYTE}"
    fields = [
        Field(1, f"{metrics[loss]:.4f} {unit_of(loss)}"),
        Field(2, f"{size(metrics['bytes_per_second'])}/s"),
        Field(4, f"wait {metrics['data_wait_share']:.1%}"),
        Field(5, f"mem {size(metrics['peak_memory_bytes'])}"),
    ]
    if "mfu" in metrics:
        fields.insert(3, Field(3, f"MFU {metrics['mfu']:.2f}"))
    return fields


def _line(fields: Sequence[Field], picture: Text, options: ConsoleOptions) -> Text:
    """Return a live line of the most important fields that fit; if all fit, a picture follows the first."""
    first, *others = fields
    with_picture = [first, Field(PICTURE_RANK, picture.plain), *others]
    kept = fitting(with_picture, options.max_width)
    parts = [picture if field.rank == PICTURE_RANK else Text(field.text) for field in kept]
    line = Text(" ").join(parts)
    line.no_wrap, line.overflow = True, "crop"
    return line


def fitting(fields: Sequence[Field], width: int) -> list[Field]:
    """Return the most important fields that fit a width, with a space between them."""
    kept = list(fields)
    while sum(len(field.text) + 1 for field in kept) - 1 > width:
        least = max(field.rank for field in kept)
        if least == 0:
            break
        kept = [field for field in kept if field.rank != least]
    return kept


def _bar(share: float, options: ConsoleOptions) -> Text:
    done = round(min(share, 1.0) * BAR_WIDTH)
    full, empty = ("#", "-") if options.ascii_only else ("━", "─")
    return Text.assemble((full * done, "bar.complete"), (empty * (BAR_WIDTH - done), "bar.back"))


def size(count: float) -> str:
    """Return a number of bytes with a unit, such as 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """Return a duration such as 1h02m, 3m20s or 12s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
