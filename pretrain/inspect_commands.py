"""The command that looks at what is there: a corpus, a row of a run's step, the proof of what a run has read."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_pipeline.errors import CorpusError
from data_pipeline.explain import explain
from data_pipeline.mixture import fingerprint_of
from data_pipeline.reading import Reading, Record, open_streams, replay
from data_pipeline.shards import Corpus
from data_pipeline.vocabulary import PADDING, SEPARATOR
from pretrain import argument_types as types
from pretrain import config as configuration
from pretrain.checkpoint import CheckpointError, Location, locate, read_metadata
from pretrain.console import display, printable, say
from pretrain.weights import is_checkpoint, store_of

app = typer.Typer()

NO_WARM_UP = {"schedule": {"warmup_steps": 0}}
"""Optimizer section that fits a run of any length."""


@app.command()
def inspect(
    path: Annotated[
        str,
        typer.Argument(
            help="A corpus (folder or URL); or a run, or one of its checkpoints.",
            show_default=False,
            parser=types.location,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Of a run, where its corpora are by now: data.shards=FOLDER.", show_default=False),
    ] = None,
    sample: Annotated[int, typer.Option(min=0, help="Bytes of a document of the corpus to show.")] = 400,
    step: Annotated[int | None, typer.Option(help="Of a run: say where a row of this step came from.")] = None,
    row: Annotated[int, typer.Option(help="Row of the step's batch, counted from 0.")] = 0,
    replay: Annotated[
        bool, typer.Option("--replay", help="Of a run: read again all that it read, and compare digests.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="That read, for --replay.")] = os.cpu_count() or 1,
) -> None:
    """Show what is in a corpus, where a row of a run came from, or prove what a run has read."""
    if step is None and not replay:
        if any((Path(path) / name).exists() for name in ("run.json", "metadata.json")):
            raise CorpusError(f"{path} is a run: ask for --step and --row, or for --replay")
        with Corpus(path) as corpus:
            _show_corpus(corpus, sample)
        return
    past = _past_reading(path, overrides or [])
    if step is not None:
        _show_row(past, step, row)
    if replay:
        _prove(past, threads)


class PastReading(NamedTuple):
    """What a run had read at a checkpoint."""

    checkpoint: Location
    reading: Reading


def _past_reading(path: str, overrides: Sequence[str]) -> PastReading:
    """Opens the corpora of a checkpoint, or of a run's newest, as it knows them. Its tensors are not looked at.

    Raises:
        CheckpointError: there is no checkpoint, its metadata is damaged, or the corpora are not those it was made of.
    """
    place = locate(path)
    checkpoints = [place] if is_checkpoint(place) else store_of(place).committed()
    if not checkpoints:
        raise CheckpointError(f"{path} is neither a corpus, nor a checkpoint, nor a run that has one")
    metadata = read_metadata(checkpoints[-1])
    stored = metadata.state["config"]
    # A recipe of an older version may be refused by now, by sections that do not matter here.
    tree = {name: stored[name] for name in ("run", "data", "model", "train")} | {"optimizer": NO_WARM_UP}
    config = configuration.with_overrides(tree, overrides, str(metadata.folder))
    only_known_holes = config.data.model_copy(update={"bad_blocks": 0})
    streams = open_streams(only_known_holes, config.model.sequence_length)
    if fingerprint_of(streams) != metadata.state["fingerprint"]:
        raise CheckpointError(
            f"{metadata.folder} was made of another stream of bytes than its corpora give now; "
            "if they were moved, say where they are: data.shards=FOLDER, or data.mixture.NAME.shards=FOLDER"
        )
    record = Record.from_state(metadata.state["reading"])
    return PastReading(metadata.folder, Reading(config.data, streams, record, None))


def _show_corpus(corpus: Corpus, sample: int) -> None:
    manifest = corpus.manifest
    stored = sum(shard["bytes"] for shard in manifest["shards"])
    table = Table(title=escape(printable(corpus.location)), show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in (
        ("documents", f"{manifest['documents']:,}"),
        ("raw bytes", f"{corpus.raw_bytes:,}"),
        ("bytes a document", f"{corpus.raw_bytes / manifest['documents']:,.0f} (mean)"),
        ("blocks", f"{len(corpus):,} of {int(corpus.lengths['raw_bytes'].max()):,} bytes at most"),
        ("modalities", ", ".join(corpus.modalities)),
        ("shards", f"{len(manifest['shards']):,}"),
        ("stored", f"{stored:,} bytes, {corpus.raw_bytes / stored:.2f} to 1"),
        ("withdrawn", f"{len({entry.key for entry in corpus.withdrawn}):,} documents"),
        ("content sha256", corpus.content_sha256),
    ):
        table.add_row(name, value)
    out = Console()
    out.print(table)
    if sample:
        block = corpus.read(0)
        first = block.slices[0]
        shown = block.content[first.start : first.start + min(sample, first.length)]
        out.print(printable(f"\n{first.key} ({first.modality}) begins:"), markup=False, highlight=False)
        out.print(shown.decode("utf-8", "backslashreplace"), markup=False, highlight=False)


def _show_row(past: PastReading, step: int, row: int) -> None:
    mixture = past.reading.mixture
    sequence = past.reading.sequence_of(step, row)
    source, number = mixture.place(sequence)
    title = (
        f"step {step}, row {row}: sequence {sequence:,} of the run, "
        f"number {number:,} of {source}, {mixture.streams[source].corpus.location}"
    )
    table = Table(title=escape(printable(title)), title_justify="left")
    for name in ("ids", "document", "its bytes", "block"):
        table.add_column(name, overflow="fold")
    for origin in explain(mixture, sequence):
        table.add_row(
            f"{origin.start}-{origin.start + origin.length - 1}",
            escape(printable(origin.key)) + (" (not read: damaged or withdrawn)" if origin.masked else ""),
            f"{origin.document_start:,}-{origin.document_start + origin.length - 1:,}",
            escape(printable(origin.block)),
        )
    out = Console()
    out.print(table)
    ids = mixture[sequence]
    separators, padding = int((ids == SEPARATOR).sum()), int((ids == PADDING).sum())
    out.print(f"{len(ids)} ids: {separators} between documents, {padding} padding")


def _prove(past: PastReading, threads: int) -> None:
    record, length = past.reading.record, past.reading.mixture.sequence_length
    with display.phase("reading again", record.next_sequence * length) as phase:
        digest = replay(past.reading, threads, lambda sequences: phase.advance(sequences * length))
    if digest != record.digest:
        raise CheckpointError(
            f"{past.checkpoint}: what the corpora give is not what the run read until step {record.step}: "
            f"digest {digest}, the run's is {record.digest}"
        )
    say(
        f"{past.checkpoint}: the {record.next_sequence:,} sequences of {length:,} that the run read until step "
        f"{record.step} are exactly what it should have read (digest {digest[:16]}…)"
    )
