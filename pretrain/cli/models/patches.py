"""The `patches` command: where the patches of a text start."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from byteloom.core.storage.files import replace_file
from byteloom.core.text import count, printable
from byteloom.model import Device
from pretrain.cli.arguments import check_finite, parse_location, parse_path
from pretrain.cli.models.weights import (
    BeginOption,
    DeviceOption,
    PrecisionOption,
    ResetOption,
    load_model,
    takes_usage_options,
)
from pretrain.engines import choose_device
from pretrain.evaluation.beginning import Beginning
from pretrain.evaluation.continuations import read_prompt
from pretrain.evaluation.modes import Mode
from pretrain.evaluation.patches.figures import StageFigures, figures_of
from pretrain.evaluation.patches.finding import PatchedText
from pretrain.evaluation.patches.page import agreement_rows, classes_of, colored, patches_page, stage_rows
from pretrain.evaluation.patches.rules import RuleChoice, RuleName
from pretrain.evaluation.patches.segments import Segment, segments_of
from pretrain.evaluation.scores import EvaluationError
from pretrain.terminal.console import display, say
from pretrain.terminal.tables import JsonOption, Table, print_json, print_lines
from pretrain.training.stop import stopping_at_once

app = typer.Typer()

SHOWN, SHOWN_IN_A_PAGE = 4_000, 200_000
"""Most bytes of a text that are shown, by default."""
MARKS, ASCII_MARKS = ("│", "║", "┃"), ("|", "||", "|||")
"""Marks before a patch without colors, by the number of stages that start one there."""
COLORS = (("#cfe3f7", "#e6f1fc"), ("#fbdcc0", "#fdeee0"), ("#d3ecc9", "#e9f6e4"), ("#e6d6f1", "#f3ebf9"))
"""Backgrounds of patches by hue and shade; see `colored`."""


@app.command("patches")
@stopping_at_once(display.close)
@takes_usage_options
def patches_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="Run (its newest checkpoint), checkpoint or export: folder or URL. Rules but entropy need none.",
            show_default=False,
            parser=parse_location,
        ),
    ],
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="File to show.", show_default=False, parser=parse_path)
    ] = None,
    rule: Annotated[
        RuleName | None,
        typer.Option(
            help="Show the patches of a rule, without a model that reads them. entropy: of a model of bytes, the "
            "export RUN."
        ),
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Bytes of a patch of --rule fixed.", show_default=False)
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Entropy in nats, of --rule entropy.", show_default=False, callback=check_finite),
    ] = None,
    increase: Annotated[
        float | None,
        typer.Option(help="Rise of the entropy in nats, of --rule entropy.", show_default=False, callback=check_finite),
    ] = None,
    bytes_per_patch: Annotated[
        float | None,
        typer.Option(
            min=1.01,
            help="Find the threshold of --rule entropy for this mean size.",
            show_default=False,
            callback=check_finite,
        ),
    ] = None,
    reset_at_newlines: ResetOption = False,
    html: Annotated[
        Path | None, typer.Option(help="Write an HTML page, instead of colors in the terminal.", parser=parse_path)
    ] = None,
    show: Annotated[
        int | None,
        typer.Option(
            min=0,
            help=f"Most bytes of text to show. Figures are of the whole file. Default: {SHOWN}, or {SHOWN_IN_A_PAGE} "
            "in a page.",
        ),
    ] = None,
    mode: Annotated[Mode, typer.Option(help="Context of each byte: windows or sliding.")] = Mode.sliding,
    begin: BeginOption = Beginning.auto,
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
    as_json: JsonOption = False,
    *,
    usage: Mapping[str, Any],
) -> None:
    """Show where the patches of a file start.

    Patches have alternating colors; without colors, marks.

    Tables show the bytes of a patch, and how often patches
    start where words, characters and runs of other bytes do,
    beside chance.
    """
    numbers = (size, threshold, increase, bytes_per_patch)
    if rule is not None:
        own, file = (None, Path(model)) if file is None else (model, file)
        text, source = _by_rule(RuleChoice(rule, own, *numbers, reset_at_newlines), file, device)
    elif file is None:
        raise EvaluationError(f"name a RUN and a FILE, or a rule: byteloom patches {model} --rule byte_class")
    elif reset_at_newlines or any(number is not None for number in numbers):
        raise EvaluationError(
            "--size, --threshold, --increase, --bytes-per-patch and --reset-at-newlines are for --rule"
        )
    else:
        loaded = load_model(model, device, precision, usage, begin)
        data, source = _content(file, read_prompt(file, loaded.card)), str(loaded.checkpoint.folder)
        with display.phase("finding patches", len(data)) as phase:
            text = loaded.patches(data, mode=mode, progress=phase.advance)
    figures = figures_of(text)
    shown = show if show is not None else SHOWN_IN_A_PAGE if html is not None else SHOWN
    if as_json:
        print_json(_as_json(file, source, text, figures, shown))
        return
    summary = f"{printable(str(file))}: {count(len(text.data), 'byte')}, {source}"
    if text.bits is not None:
        summary += f", {text.bits.mean():.4f} bits per byte"
    remarks = _remarks(text, figures, shown)
    segments = list(segments_of(text, shown))
    if html is not None:
        replace_file(html, patches_page(f"Patches of {printable(file.name)}", summary, remarks, segments, figures))
        say(f"{html} has {summary}")
        return
    legend = _print_segments(segments, len(figures))
    print_lines(["", summary, *remarks, *legend, ""])
    for table in _tables(figures):
        table.print()
        print_lines([""])


def _by_rule(choice: RuleChoice, file: Path, device: Device) -> tuple[PatchedText, str]:
    """Return a file with the patches of a rule, and the rule in words."""
    data = _content(file, read_prompt(file, None))
    passes = 1 if choice.bytes_per_patch is None else 2
    with display.phase("finding patches", passes * len(data)) as phase:
        return choice.patches(data, choose_device(device), phase.advance)


def _content(file: Path, data: bytes) -> bytes:
    if not data:
        raise EvaluationError(f"{file} is empty")
    return data


def _remarks(text: PatchedText, figures: Mapping[str, StageFigures], shown: int) -> list[str]:
    """Return sentences about what is shown."""
    remarks = []
    if shown < len(text.data):
        remarks.append(f"The text shown is the first {count(shown, 'byte')}. The tables count the whole file.")
    if any(own.exact["characters"].precision < 1 for own in figures.values()):
        remarks.append("A patch that starts within a character is shown before it.")
    for stage, own in figures.items():
        if own.full_windows:
            of = f"Stage {stage}: " if len(figures) > 1 else ""
            remarks.append(
                f"{of}{own.full_windows:.1%} of the windows have more patches than the model's capacity; their last "
                "bytes have no new ones."
            )
    return remarks


def _print_segments(segments: Iterable[Segment], stages: int) -> list[str]:
    """Print segments on standard output: with colors, or with marks where there are none. Return the legend."""
    out = Console()
    text = Text()
    if out.color_system is not None and not out.no_color:
        legend = f"A color is a patch of stage {stages - 1}; its shades are patches of stage 0."
        for segment, (hue, shade) in colored(segments, stages):
            text.append(segment.text, f"black on {COLORS[hue][shade]}")
    else:
        marks = ("", *(ASCII_MARKS if out.options.ascii_only else MARKS))
        legend = f"{marks[1]} starts a patch of stage 0, and {marks[2]} one of stage 1 too."
        for segment in segments:
            text.append(marks[min(segment.stages, len(MARKS))] + segment.text)
    if text:
        out.print(text, soft_wrap=True)
    return [legend] if stages > 1 else []


def _tables(figures: Mapping[str, StageFigures]) -> Iterable[Table]:
    """Yield the tables: patches by stage, agreement of each stage, sizes of all stages."""
    headings, rows = stage_rows(figures)
    yield _table("patches", headings, rows)
    for stage, own in figures.items():
        yield _table("agreement" + (f" of stage {stage}" if len(figures) > 1 else ""), *agreement_rows(own))
    sizes = [
        [name, *(f"{own.sizes[name] / own.patches:.1%}" for own in figures.values())]
        for name in classes_of(figures.values())
    ]
    shares = [f"share of patches{f' of stage {stage}' if len(figures) > 1 else ''}" for stage in figures]
    yield _table("sizes", ["bytes", *shares], sizes)


def _table(title: str, headings: list[str], rows: list[list[str]]) -> Table:
    table = Table(title, headings, headings[1:])
    for row in rows:
        table.add_row(*row)
    return table


def _as_json(
    file: Path, source: str, text: PatchedText, figures: Mapping[str, StageFigures], shown: int
) -> dict[str, Any]:
    return {
        "file": str(file),
        "source": source,
        "bytes": len(text.data),
        "bits_per_byte": None if text.bits is None else float(text.bits.mean()),
        "windows": text.windows or None,
        "stages": {
            stage: own.as_json() | {"starts": text.starts[stage][:shown].nonzero()[0].tolist()}
            for stage, own in figures.items()
        },
    }
