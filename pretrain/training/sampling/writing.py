"""Samples of one checkpoint: prompts of the recipe, and what the model writes after them.

texts, files, held-out documents ─▶ prompts_of ─▶ Continuations ─▶ generate ─▶ SampleSet and files of media
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.media import MediaCard
from pretrain.evaluation.continuations import Continuations, OutputFormat, read_prompt
from pretrain.evaluation.generation import Sampling
from pretrain.tracking.samples import Sample, SampleSet
from pretrain.training.sampling.config import SamplesConfig

BEGINNING_BYTES = 64
"""Most bytes of the beginning of a document that is no media."""

Generate = Callable[[Sequence[bytes], Sequence[int], Sampling], Iterator[tuple[int, int]]]
"""Yields (row, byte) of the continuations of prompts, given the most bytes of each."""


class Prompt(NamedTuple):
    """Bytes to continue."""

    source: str
    """Where they come from, for people."""
    content: bytes


def prompts_of(config: SamplesConfig, card: MediaCard | None, context: int, held_out: Corpus | None) -> list[Prompt]:
    """Return the prompts of a recipe; an empty one, if it names none and there is no validation corpus.

    Args:
        config: of the samples.
        card: layout of the documents that the model was trained on; None for other documents.
        context: longest context of the model, in bytes. A beginning takes at most half of it.
        held_out: corpus of the held-out documents; None if the run has no validation.

    Raises:
        CorpusError, SamplingError: a file or the corpus cannot be read, or a file has other media than the corpus.
    """
    found = [Prompt(f"prompt {number}", text.encode()) for number, text in enumerate(config.prompts, 1)]
    found += [Prompt(Path(file).name, read_prompt(Path(file), card)) for file in config.files]
    if held_out is not None and config.held_out:
        found += _beginnings(held_out, config.held_out, card, context)
    return found or [Prompt("empty prompt", b"")]


def _beginnings(corpus: Corpus, count: int, card: MediaCard | None, context: int) -> list[Prompt]:
    """Return the beginnings of the first documents of a corpus: whole frames, at most half of a document."""
    frame = (card.frame_bytes if card is not None else None) or 1
    most = BEGINNING_BYTES
    if card is not None:
        most = card.image_bytes or frame * (card.rate or BEGINNING_BYTES)
    found = list[Prompt]()
    for piece in corpus.pieces():
        if len(found) == count:
            break
        if piece.offset == 0 and piece.content:
            length = min(most, len(piece.content) // 2, context // 2)
            found.append(Prompt(f"held-out {piece.key}", piece.content[: length - length % frame]))
    return found


def write_continuations(
    config: SamplesConfig,
    prompts: Sequence[Prompt],
    card: MediaCard | None,
    generate: Generate,
    *,
    step: int,
    time: float,
) -> tuple[SampleSet, dict[str, bytes]]:
    """Return the samples of a step, and the content of their pictures and sounds by name.

    Args:
        config: of the samples.
        prompts: to continue.
        card: layout of the documents that the model was trained on; None for other documents.
        generate: decodes.
        step: optimizer steps done.
        time: when that was, in seconds since 1970.

    Raises:
        SamplingError: a prompt has no room for a continuation.
    """
    task = Continuations(card, [each.content for each in prompts], config.bytes, OutputFormat.auto, to_files=True)
    written = [bytearray() for _ in prompts]
    for row, byte in generate(task.prompts, task.counts, Sampling(config.temperature)):
        written[row].append(byte)
    samples, files = list[Sample](), dict[str, bytes]()
    for number, (prompt, content, continuation) in enumerate(zip(prompts, task.prompts, written, strict=True)):
        file = None if task.format is OutputFormat.raw else f"{number}.{task.suffix}"
        whole = bytes(continuation[: task.whole(content, continuation)])
        if file is not None:
            files[file] = task.file_of(content, continuation)
        samples.append(Sample(source=prompt.source, prompt_hex=content.hex(), continuation_hex=whole.hex(), file=file))
    found = SampleSet(step=step, time=time, temperature=config.temperature, samples=tuple(samples))
    return found, files
