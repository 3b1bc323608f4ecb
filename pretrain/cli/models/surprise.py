"""The `surprise` command: the bits of each byte of a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from byteloom.core.storage.files import replace_file
from byteloom.core.text import count, printable
from pretrain.cli.arguments import parse_path
from pretrain.cli.models.shades import print_legend, print_shaded
from pretrain.cli.models.weights import (
    DeviceOption,
    ModelPath,
    PrecisionOption,
    load_model,
    takes_usage_options,
)
from pretrain.evaluation.continuations import read_prompt
from pretrain.evaluation.modes import Mode
from pretrain.evaluation.scores import EvaluationError
from pretrain.evaluation.surprise import characters_of, surprise_page
from pretrain.terminal.console import display, say
from pretrain.training.stop import stopping_at_once

app = typer.Typer()


@app.command("surprise")
@stopping_at_once(display.close)
@takes_usage_options
def surprise_command(
    model: ModelPath,
    file: Annotated[Path, typer.Argument(help="File to show.", show_default=False, parser=parse_path)],
    html: Annotated[
        Path | None, typer.Option(help="Write an HTML page, instead of colors in the terminal.", parser=parse_path)
    ] = None,
    mode: Annotated[Mode, typer.Option(help="Context of each byte; windows is its own window only.")] = Mode.sliding,
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
    *,
    usage: Mapping[str, Any],
) -> None:
    """Show the bits of each byte of a file as shades.

    Bytes that the model expects have few bits. A character of several bytes has the shade of their mean.
    """
    loaded = load_model(model, device, precision, usage)
    data = read_prompt(file, loaded.card)
    if not data:
        raise EvaluationError(f"{file} is empty")
    with display.phase("scoring"):
        bits = loaded.bits(data, mode=mode).tolist()
    summary = f"{count(len(data), 'byte')}, {sum(bits) / len(bits):.4f} bits per byte"
    characters = characters_of(data, bits)
    if html is not None:
        replace_file(html, surprise_page(printable(str(file)), f"{loaded.checkpoint.folder}: {summary}", characters))
        say(f"{html} has {summary}")
        return
    print_legend()
    print_shaded(characters)
    say(summary)
