"""The `generate` command: continue prompts with bytes from a model."""

import contextlib
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from byteloom.core.text import count
from data_pipeline.errors import CorpusError
from pretrain.cli.arguments import MODELS_PANEL, parse_path
from pretrain.cli.weights import Device, DeviceOption, LatentsOption, ModelPath, PrecisionOption, load_model
from pretrain.evaluation.generation import Sampling, SamplingError, generate_rows
from pretrain.terminal.console import say
from pretrain.training.stop import stopping_at_once

app = typer.Typer()


@app.command("generate", rich_help_panel=MODELS_PANEL)
@stopping_at_once(lambda: say(""))
def generate_command(
    model: ModelPath,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue (repeatable).")] = None,
    prompt_file: Annotated[
        list[Path] | None,
        typer.Option(help="File of bytes to continue (repeatable).", parser=parse_path),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Number of continuations of each prompt.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the continuations, as PROMPT-SAMPLE.bin. Required for more than one.",
            parser=parse_path,
        ),
    ] = None,
    most_bytes: Annotated[int, typer.Option("--bytes", min=1, help="Most bytes of a continuation.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, help="Divisor of the logits. 0 takes the most likely byte.")
    ] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the k most likely bytes.")] = None,
    top_p: Annotated[
        float, typer.Option(help="Draw from the most likely bytes whose probabilities add up to p.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the draws.")] = 0,
    latents: LatentsOption = None,
    device: DeviceOption = Device.auto,
    precision: PrecisionOption = None,
) -> None:
    """Continue a prompt with bytes from a model.

    Writes the bytes to standard output, or several continuations to a folder.
    A continuation ends early if the model ends the document.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    prompts = [text.encode("utf-8", "surrogateescape") for text in prompt or []]
    for path in prompt_file or []:
        try:
            prompts.append(path.read_bytes())
        except OSError as error:
            raise CorpusError(f"cannot read the prompt file {path}: {error.strerror}") from error
    prompts = [each for each in prompts or [b""] for _ in range(samples)]
    if out is None and len(prompts) > 1:
        raise SamplingError(f"{len(prompts)} continuations need a folder: add --out FOLDER")
    loaded, _ = load_model(model, device, precision, latents)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    written = [bytearray() for _ in prompts]
    started = time.perf_counter()
    with contextlib.suppress(BrokenPipeError):  # the reader closed the pipe
        for row, byte in generate_rows(loaded, prompts, most_bytes, sampling):
            written[row].append(byte)
            if out is None:
                sys.stdout.buffer.write(bytes([byte]))
                sys.stdout.buffer.flush()
    seconds = time.perf_counter() - started
    if out is not None:
        for row, continuation in enumerate(written):
            (out / f"{row // samples:03d}-{row % samples:03d}.bin").write_bytes(continuation)
    total = sum(map(len, written))
    ended = sum(len(continuation) < most_bytes for continuation in written)
    ending = f"; the model ended {ended} of {count(len(written), 'document')}" if ended else ""
    say(f"\n{count(total, 'byte')}, {total / seconds:,.0f} bytes/s{ending}")
