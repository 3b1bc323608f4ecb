"""The `top` command: live view of runs in the terminal."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from byteloom.core.errors import CorrectableError
from byteloom.core.text import clean, count
from launchers.slurm.scheduler import JobPhase
from pretrain.cli.arguments import check_finite, parse_path
from pretrain.report.events import Event, newest_event
from pretrain.terminal.console import say
from pretrain.terminal.losses import unit_of
from pretrain.terminal.progress import duration, size
from pretrain.terminal.screen import watch
from pretrain.terminal.tables import Table, fold, terminal_width
from pretrain.training.run_folder import RunFolder
from pretrain.training.run_status import DAMAGED, RunStatus, find_runs, statuses_of

LOG_TAIL_BYTES = 64 << 10
"""Bytes at the end of train.log in which the newest event is looked for."""
FIRST_STATES = [JobPhase.RUNNING, *[phase for phase in JobPhase if phase.is_alive], DAMAGED, JobPhase.FAILED]
"""States that are shown first, in this order; then all others."""
LAST_STATES = [JobPhase.CANCELLED, "stopped", JobPhase.FINISHED]
"""States that are shown last, in this order."""
COLUMNS = ["run", "state", "step", "bits/byte", "loss", "bytes/s", "MFU", "wait", "left", "nodes", "last event"]
NUMBERS = ["step", "bits/byte", "loss", "bytes/s", "MFU", "wait", "left"]
SHORTEST_EVENT = 20
"""Fewest characters of the last event beside a table; in a narrower terminal, each run has several lines."""

app = typer.Typer()


@dataclass(frozen=True)
class ShownRun:
    """A run in the view."""

    status: RunStatus
    event: Event | None
    """Newest event; None if there is none, or if it cannot be read."""


@dataclass(frozen=True)
class Frame:
    """Content of the view at one moment."""

    runs: list[ShownRun]
    time: float
    """Seconds since 1970."""
    problem: str = ""
    """Why the runs cannot be listed; empty if they can."""


@app.command("top")
def top_command(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN", help="Runs, or folders of runs. Default: runs.", parser=parse_path),
    ] = None,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two refreshes.", callback=check_finite)] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print the view once. The default without a terminal.")] = False,
) -> None:
    """Watch runs in the terminal: step, loss, speed, MFU, wait for data, time left, nodes, last event.

    Press q or Ctrl-C to end, and any other key to refresh at once.
    """
    paths = runs or [Path("runs")]
    out = Console()
    first = read_frame(paths, say)
    if once or not out.is_terminal or not out.file.isatty():
        for line in lines_of(first, terminal_width(out), None):
            out.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    watch(lambda: _read_again(paths), picture_of, every, out)


def read_frame(paths: Sequence[Path], report: Callable[[str], None] = lambda skipped: None) -> Frame:
    """Return the runs at paths, those that are trained first; see `find_runs` for the arguments.

    Raises:
        RunFolderError: a path does not exist, or no path has a run.
    """
    found = [ShownRun(status, _event_of(status)) for status in statuses_of(find_runs(paths, report))]
    return Frame(sorted(found, key=lambda run: (_order(run.status.state), Path(run.status.run).name)), time.time())


def _read_again(paths: Sequence[Path]) -> Frame:
    """Return the runs at paths; a frame with a problem if a path has no run any more."""
    try:
        return read_frame(paths)
    except (CorrectableError, OSError) as error:
        return Frame([], time.time(), str(error))


def _order(state: str) -> int:
    if state in FIRST_STATES:
        return FIRST_STATES.index(state)
    return len(FIRST_STATES) + (1 + LAST_STATES.index(state) if state in LAST_STATES else 0)


def _event_of(status: RunStatus) -> Event | None:
    try:
        return newest_event(RunFolder(Path(status.run)), LOG_TAIL_BYTES)
    except (CorrectableError, OSError, ValueError) as error:
        if str(error) not in status.problems:
            status.problems.append(str(error))
        return None


def picture_of(frame: Frame, console: Console) -> Text:
    """Return a frame that fills the terminal and is no larger."""
    width, height = console.size
    lines = lines_of(frame, width, height)
    return Text("\n".join(line[:width] for line in lines[:height]), no_wrap=True, overflow="crop")


def lines_of(frame: Frame, width: int | None, height: int | None) -> list[str]:
    """Return the lines of a frame.

    Args:
        frame: the content.
        width: of the terminal in columns; None for a file or a pipe.
        height: of the terminal in lines; runs that do not fit are counted in the last line. None shows all.
    """
    states = [run.status.state for run in frame.runs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    moment = time.strftime("%H:%M:%S", time.localtime(frame.time))
    heading = f"{moment}  {count(len(states), 'run')}: {counts}" if states else f"{moment}  {frame.problem}"
    head = [*fold(heading, width), ""]
    if not frame.runs:
        return head
    header, blocks = _blocks(frame, width)
    return _fitted([*head, *header], blocks, height)


def _blocks(frame: Frame, width: int | None) -> tuple[list[str], list[list[str]]]:
    """Return the header and the lines of each run: a table if it is not too wide, else some lines for each run."""
    rows = [_cells(run, frame.time) for run in frame.runs]
    kept = [name for name in COLUMNS if name == "run" or any(row[name] for row in rows)]
    table = Table("", [name for name in kept if name != "last event"], NUMBERS)
    for row in rows:
        table.add_row(*(row[name] for name in kept if name != "last event"))
    names, rule, *lines = table.lines(None)
    left = max(map(len, (names, rule, *lines))) + 2
    problems = [_problems(run, width) for run in frame.runs]
    if width is not None and left + SHORTEST_EVENT > width:
        cards = [_card(row, width) for row in rows]
        return [], [card + problem for card, problem in zip(cards, problems, strict=True)]
    room = None if width is None else width - left
    blocks = [
        [f"{line:{left}}{_cut(row['last event'], room)}".rstrip(), *problem]
        for line, row, problem in zip(lines, rows, problems, strict=True)
    ]
    return [f"{names:{left}}last event", "-" * (left + len("last event"))], blocks


def _cells(run: ShownRun, now: float) -> dict[str, str]:
    """Return the text of each column."""
    status, event = run.status, run.event
    ranks = count(status.ranks, "rank") if status.ranks and status.nodes else ""
    age = "" if event is None else f"{duration(max(0.0, now - event.time))} ago: {event.kind} {event.reason}".rstrip()
    return {
        "run": clean(Path(status.run).name),
        "state": status.state,
        "step": f"{status.step:,}/{'?' if status.steps is None else f'{status.steps:,}'}",
        "bits/byte": "" if status.bits_per_byte is None else f"{status.bits_per_byte:.4f}",
        "loss": _other_loss(status),
        "bytes/s": "" if status.bytes_per_second is None else size(status.bytes_per_second),
        "MFU": "" if status.mfu is None else f"{status.mfu:.2f}",
        "wait": "" if status.data_wait_share is None else f"{status.data_wait_share:.1%}",
        "left": "" if status.seconds_left is None else duration(status.seconds_left),
        "nodes": ", ".join(filter(None, (status.nodes, ranks))),
        "last event": clean(" ".join(age.split())),
    }


def _other_loss(status: RunStatus) -> str:
    """Return the loss of an objective other than causal, with its unit."""
    return (
        "" if status.loss is None or status.bits_per_byte is not None else f"{status.loss:.4f} {unit_of(status.metric)}"
    )


def _card(cells: dict[str, str], width: int) -> list[str]:
    """Return the lines of a run in a narrow terminal."""
    units = {
        "bits/byte": "{} bits/byte",
        "loss": "{}",
        "bytes/s": "{}/s",
        "MFU": "MFU {}",
        "wait": "wait {}",
    }
    numbers = [pattern.format(cells[name]) for name, pattern in units.items() if cells[name]]
    left = f"{cells['left']} left" if cells["left"] else ""
    lines = [
        "  ".join(filter(None, (cells["run"], cells["state"], cells["step"], left))),
        "  " + "  ".join(numbers),
        "  " + cells["nodes"],
        _cut("  " + cells["last event"], width),
    ]
    return [folded for line in lines if line.strip() for folded in fold(line, width)]


def _problems(run: ShownRun, width: int | None) -> list[str]:
    return [line for problem in run.status.problems for line in fold(clean(f"  {' '.join(problem.split())}"), width)]


def _cut(text: str, room: int | None) -> str:
    return text if room is None or len(text) <= room else f"{text[: room - 1]}…"


def _fitted(head: list[str], blocks: list[list[str]], height: int | None) -> list[str]:
    """Return as many runs as fit a height, and the number of the others."""
    lines = list(head)
    for number, block in enumerate(blocks):
        is_last = number == len(blocks) - 1
        if height is not None and len(lines) + len(block) + (not is_last) > height:
            return [*lines, f"… {count(len(blocks) - number, 'more run')}"]
        lines += block
    return lines
