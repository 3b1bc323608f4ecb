"""The `generate` command: continue prompts with bytes from a model."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from byteloom.core.text import count
from byteloom.model import Model
from data_pipeline.errors import CorpusError
from pretrain.cli.arguments import parse_path
from pretrain.cli.models.weights import (
    BeginOption,
    DeviceOption,
    ModelPath,
    PrecisionOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    load_model,
    takes_usage_options,
)
from pretrain.evaluation.beginning import Beginning
from pretrain.evaluation.continuations import Continuations, OutputFormat, read_prompt
from pretrain.evaluation.generation import Sampling, SamplingError
from pretrain.evaluation.speculation import Speculation
from pretrain.terminal.console import say
from pretrain.training.stop import stopping_at_once

app = typer.Typer()


@app.command("generate")
@stopping_at_once(lambda: say(""))
@takes_usage_options
def generate_command(
    model: ModelPath,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue (repeatable).")] = None,
    prompt_file: Annotated[
        list[Path] | None,
        typer.Option(help="File to continue (repeatable): bytes, or media like the training data.", parser=parse_path),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Number of continuations of each prompt.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the continuations, as PROMPT-SAMPLE.bin, .wav or .png. Required for more than one.",
            parser=parse_path,
        ),
    ] = None,
    most_bytes: Annotated[
        int | None,
        typer.Option("--bytes", min=1, help="Most bytes of a continuation. Default: 256, or the rest of a picture."),
    ] = None,
    output_format: Annotated[
        OutputFormat,
        typer.Option("--as", help="Format. auto: in a folder, that of the training data; else raw bytes."),
    ] = OutputFormat.auto,
    temperature: TemperatureOption = 1.0,
    top_k: TopKOption = None,
    top_p: TopPOption = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the draws.")] = 0,
    beams: Annotated[
        int | None,
        typer.Option(min=1, help="Width of a beam search, which replaces the draws. For an encoder_decoder."),
    ] = None,
    speculate: Annotated[
        bool,
        typer.Option(
            "--speculate",
            help="Let the heads of model.multi_byte draft bytes: the same bytes, faster if many drafts are kept.",
        ),
    ] = False,
    begin: BeginOption = Beginning.auto,
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
    *,
    usage: Mapping[str, Any],
) -> None:
    """Continue a prompt with bytes from a model.

    A model that was trained on pairs answers the prompt.
    Writes the bytes to standard output, or several continuations to a folder.
    A continuation ends early if the model ends the document. A picture ends at its last pixel.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    continuations = samples * (len(prompt or []) + len(prompt_file or []) or 1)
    if out is None and continuations > 1:
        raise SamplingError(f"{continuations} continuations need a folder: add --out FOLDER")
    for path in prompt_file or []:
        if not path.exists():
            raise CorpusError(f"cannot read {path}: it does not exist")
    loaded = load_model(model, device, precision, usage, begin)
    card = loaded.card
    prompts = [text.encode("utf-8", "surrogateescape") for text in prompt or []]
    prompts += [read_prompt(path, card) for path in prompt_file or []]
    rows = [each for each in prompts or [b""] for _ in range(samples)]
    task = Continuations(card, rows, most_bytes, output_format, to_files=out is not None)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    speculation = Speculation() if speculate else None
    drawn = _drawn(loaded, task, sampling, beams, speculation)
    streams = out is None and task.format is OutputFormat.raw
    written = [bytearray() for _ in rows]
    shown = 0
    started = time.perf_counter()
    with contextlib.suppress(BrokenPipeError):  # the reader closed the pipe
        for row, byte in drawn:
            written[row].append(byte)
            if streams and (end := task.whole(task.prompts[0], written[0])) > shown:
                sys.stdout.buffer.write(written[0][shown:end])
                sys.stdout.buffer.flush()
                shown = end
        if out is None and not streams:
            sys.stdout.buffer.write(task.file_of(task.prompts[0], written[0]))
            sys.stdout.buffer.flush()
    seconds = time.perf_counter() - started
    if out is not None:
        for row, continuation in enumerate(written):
            path = out / f"{row // samples:03d}-{row % samples:03d}.{task.suffix}"
            path.write_bytes(task.file_of(task.prompts[row], continuation))
    total = sum(map(len, written))
    ended = sum(len(continuation) < most for continuation, most in zip(written, task.counts, strict=True))
    ending = f"; the model ended {ended} of {count(len(written), 'document')}" if ended else ""
    passes = f", {speculation.drawn / speculation.passes:.2f} bytes a pass" if speculation else ""
    say(f"\n{count(total, 'byte')}, {total / seconds:,.0f} bytes/s{passes}{ending}")


def _drawn(
    loaded: Model, task: Continuations, sampling: Sampling, beams: int | None, speculation: Speculation | None
) -> Iterator[tuple[int, int]]:
    """Return the bytes of each row: drawn, or those of a beam search."""
    if beams is None:
        return loaded.generate_rows(task.prompts, task.counts, sampling, speculation)
    if speculation is not None:
        raise SamplingError("--speculate and --beams exclude each other")
    rows = zip(task.prompts, task.counts, strict=True)
    found = (loaded.beam_search(prompt, beams=beams, bytes=count) for prompt, count in rows)
    return ((row, byte) for row, answer in enumerate(found) for byte in answer)
