"""The `chat` command: type a text, and the model continues it."""

import codecs
import importlib
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import count
from typing import Annotated, Any

import typer

from byteloom.model import Model
from pretrain.cli.models.shades import print_legend, print_shaded
from pretrain.cli.models.weights import (
    DeviceOption,
    ModelPath,
    PrecisionOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    load_model,
    takes_usage_options,
)
from pretrain.evaluation.surprise import characters_of, visible
from pretrain.terminal.console import say

app = typer.Typer()


@app.command("chat")
@takes_usage_options
def chat_command(
    model: ModelPath,
    most_bytes: Annotated[int, typer.Option("--bytes", min=1, help="Most bytes of a continuation.")] = 256,
    temperature: TemperatureOption = 0.8,
    top_k: TopKOption = None,
    top_p: TopPOption = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Seed of the draws.")] = 0,
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
    *,
    usage: Mapping[str, Any],
) -> None:
    """Type a text, and the model continues it.

    The bits of each byte that you typed are shown as shades. The document grows with your text and the model's.
    An empty line lets the model continue. A backslash at the end of a line is a line break.
    Ctrl-C ends a continuation, Ctrl-D the command.
    """
    loaded = load_model(model, device, precision, usage)
    if sys.stdin.isatty():
        with suppress(ImportError):  # some builds of Python lack it
            importlib.import_module("readline")  # gives input() a history and keys that edit the line
    print_legend()
    document = b""
    with suppress(EOFError, KeyboardInterrupt):
        for turn in count():
            if typed := _read_text():
                document += typed
                print_shaded(characters_of(typed, _bits_of_end(loaded, document, len(typed))), end="")
            drawn = loaded.generate(
                document, bytes=most_bytes, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed + turn
            )
            added, is_whole = _print_bytes(drawn)
            document += added
            if is_whole and len(added) < most_bytes:
                say("the model ended the document; your next text begins a new one")
                document = b""
    if sys.stdin.isatty():
        print()  # leaves the line of the prompt


def _read_text() -> bytes:
    """Return what a person types: a line, and further ones after a backslash.

    Raises:
        EOFError: there is no more.
    """
    is_terminal = sys.stdin.isatty()
    lines = [input("> " if is_terminal else "")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input("… " if is_terminal else ""))
    return "\n".join(lines).encode("utf-8", "surrogateescape")


def _bits_of_end(model: Model, document: bytes, length: int) -> list[float]:
    """Return the bits of the last bytes of a document, given as many bytes before them as the model can read."""
    read = document[-max(length, model.sequence_length) :]
    return list(model.bits(read)[-length:].tolist())


def _print_bytes(drawn: Iterable[bytes]) -> tuple[bytes, bool]:
    """Print bytes as they are drawn; return them, and whether Ctrl-C did not end them."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    added = bytearray()
    is_whole = False
    with suppress(KeyboardInterrupt):
        for byte in drawn:
            added += byte
            _print(decoder.decode(byte))
        is_whole = True
    _print(decoder.decode(b"", final=True) + "\n")
    return bytes(added), is_whole


def _print(text: str) -> None:
    shown = "".join(each if each in "\n\t" else visible(each) for each in text)
    sys.stdout.write(shown)
    sys.stdout.flush()
