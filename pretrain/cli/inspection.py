"""The `inspect` command: contents of a corpus, origin of a row of a run, proof of what a run read."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console

from byteloom.core.text import count
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.errors import CorpusError
from data_pipeline.stream.explain import explain
from data_pipeline.stream.mixture import fingerprint_of
from data_pipeline.stream.reading import Reading, open_streams, replay
from data_pipeline.stream.record import Record
from data_pipeline.vocabulary import PADDING, SEPARATOR
from pretrain.checkpoint import CheckpointError, Location, locate, read_metadata
from pretrain.cli.arguments import CORPORA_PANEL, parse_location
from pretrain.config.loading import with_overrides
from pretrain.terminal.console import display, printable, say
from pretrain.terminal.tables import JsonOption, Table, facts, print_json, print_lines
from pretrain.training.weights import is_checkpoint, store_of

app = typer.Typer()

NO_WARM_UP = {"schedule": {"warmup_steps": 0}}
"""Optimizer section that is valid for a run of any length."""


@app.command("inspect", rich_help_panel=CORPORA_PANEL)
def inspect_command(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="Corpus (folder or URL), run, or checkpoint of a run.",
            show_default=False,
            parser=parse_location,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FIELD=VALUE",
            help="For a run with moved corpora: data.shards=FOLDER.",
            show_default=False,
        ),
    ] = None,
    sample: Annotated[int, typer.Option(min=0, help="For a corpus: bytes of its first document to show.")] = 400,
    step: Annotated[int | None, typer.Option(help="For a run: show the origin of a row of this step.")] = None,
    row: Annotated[int, typer.Option(help="Row of the step's batch, from 0.")] = 0,
    replay: Annotated[
        bool, typer.Option("--replay", help="For a run: read its data again, and compare digests.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads that read, for --replay.")] = os.cpu_count() or 1,
    as_json: JsonOption = False,
) -> None:
    """Show the contents of a corpus, or the data that a run read.

    For a run, show the origin of a row (--step, --row), or prove what the run read (--replay).
    """
    if step is None and not replay:
        if any((Path(path) / name).exists() for name in ("run.json", "metadata.json")):
            raise CorpusError(f"{path} is a run, not a corpus: add --step and --row, or --replay")
        with Corpus(path) as corpus:
            if as_json:
                print_json(corpus_facts(corpus))
            else:
                corpus_table(corpus.location, corpus_facts(corpus)).print()
                _show_sample(corpus, sample)
        return
    past = _past_reading(path, overrides or [])
    found: dict[str, Any] = {}
    if step is not None:
        found["row"] = _row(past, step, row)
        if not as_json:
            row_table(found["row"]).print()
            print_lines([row_summary(found["row"])])
    if replay:
        found["replay"] = _prove(past, threads)
    if as_json:
        print_json(found)


class PastReading(NamedTuple):
    """The data that a run had read at a checkpoint."""

    checkpoint: Location
    reading: Reading


def _past_reading(path: str, overrides: Sequence[str]) -> PastReading:
    """Open the corpora of a checkpoint, or of a run's newest checkpoint, without reading its tensors.

    Raises:
        CheckpointError: there is no checkpoint, its metadata is damaged, or the corpora hold other bytes.
    """
    place = locate(path)
    checkpoints = [place] if is_checkpoint(place) else store_of(place).committed()
    if not checkpoints:
        raise CheckpointError(f"{path} has no checkpoint; name a corpus, a checkpoint, or a run with a checkpoint")
    metadata = read_metadata(checkpoints[-1])
    stored = metadata.state["config"]
    # This version may refuse sections of an older recipe that do not matter here.
    tree = {name: stored[name] for name in ("run", "data", "model", "train")} | {"optimizer": NO_WARM_UP}
    config = with_overrides(tree, overrides, str(metadata.folder))
    only_known_holes = config.data.model_copy(update={"bad_blocks": 0})
    streams = open_streams(only_known_holes, config.model.sequence_length)
    if fingerprint_of(streams) != metadata.state["fingerprint"]:
        raise CheckpointError(
            f"the corpora of {metadata.folder} hold other bytes than it read; if they were moved, "
            "add their new place: data.shards=FOLDER, or data.mixture.NAME.shards=FOLDER"
        )
    record = Record.from_state(metadata.state["reading"])
    return PastReading(metadata.folder, Reading(config.data, streams, record, None))


def corpus_facts(corpus: Corpus) -> dict[str, Any]:
    """Return the facts of a corpus as JSON."""
    manifest = corpus.manifest
    return {
        "documents": manifest["documents"],
        "raw_bytes": corpus.raw_bytes,
        "blocks": len(corpus),
        "largest_block": int(corpus.lengths["raw_bytes"].max()),
        "modalities": list(corpus.modalities),
        "shards": len(manifest["shards"]),
        "stored_bytes": sum(shard["bytes"] for shard in manifest["shards"]),
        "withdrawn": len({entry.key for entry in corpus.withdrawn}),
        "content_sha256": corpus.content_sha256,
    }


def corpus_table(location: str, found: Mapping[str, Any]) -> Table:
    """Return a table of the facts of a corpus."""
    raw, stored = found["raw_bytes"], found["stored_bytes"]
    return facts(
        location,
        {
            "documents": f"{found['documents']:,}",
            "raw bytes": f"{raw:,}",
            "bytes per document": f"{raw / found['documents']:,.0f} (mean)",
            "blocks": f"{found['blocks']:,}; the largest has {count(found['largest_block'], 'byte')}",
            "modalities": ", ".join(found["modalities"]),
            "shards": f"{found['shards']:,}",
            "stored": f"{count(stored, 'byte')}, {raw / stored:.2f} to 1",
            "withdrawn": count(found["withdrawn"], "document"),
            "content sha256": found["content_sha256"],
        },
    )


def _show_sample(corpus: Corpus, sample: int) -> None:
    if not sample:
        return
    block = corpus.read(0)
    first = block.slices[0]
    shown = block.content[first.start : first.start + min(sample, first.length)]
    out = Console()
    out.print(printable(f"\n{first.key} ({first.modality}) begins:"), markup=False, highlight=False, soft_wrap=True)
    out.print(shown.decode("utf-8", "backslashreplace"), markup=False, highlight=False, soft_wrap=True)


def _row(past: PastReading, step: int, row: int) -> dict[str, Any]:
    """Return the origins of a row's ids as JSON."""
    mixture = past.reading.mixture
    sequence = past.reading.sequence_of(step, row)
    source, number = mixture.place(sequence)
    ids = mixture[sequence]
    return {
        "step": step,
        "row": row,
        "sequence": sequence,
        "source": source,
        "number": number,
        "corpus": mixture.streams[source].corpus.location,
        "ids": len(ids),
        "separators": int((ids == SEPARATOR).sum()),
        "padding": int((ids == PADDING).sum()),
        "origins": [asdict(origin) for origin in explain(mixture, sequence)],
    }


def row_table(found: Mapping[str, Any]) -> Table:
    """Return a table of the origins of a row's ids."""
    title = (
        f"step {found['step']}, row {found['row']}: sequence {found['sequence']:,} of the run, "
        f"number {found['number']:,} of {found['source']}, {found['corpus']}"
    )
    table = Table(title, ["ids", "document", "its bytes", "block"], numbers=["ids", "its bytes"])
    for origin in found["origins"]:
        start, begin, length = origin["start"], origin["document_start"], origin["length"]
        table.add_row(
            f"{start}-{start + length - 1}",
            origin["key"] + (" (not read: damaged or withdrawn)" if origin["masked"] else ""),
            f"{begin:,}-{begin + length - 1:,}",
            origin["block"],
        )
    return table


def row_summary(found: Mapping[str, Any]) -> str:
    """Return the number of separators and paddings of a row in a sentence."""
    return (
        f"{count(found['ids'], 'id')}: {count(found['separators'], 'separator')} between documents, "
        f"{found['padding']:,} padding"
    )


def _prove(past: PastReading, threads: int) -> dict[str, Any]:
    """Read again the data that a run read, and compare digests.

    Raises:
        CheckpointError: the corpora hold other bytes.
    """
    record, length = past.reading.record, past.reading.mixture.sequence_length
    with display.phase("reading again", record.next_sequence * length) as phase:
        digest = replay(past.reading, threads, lambda sequences: phase.advance(sequences * length))
    if digest != record.digest:
        raise CheckpointError(
            f"{past.checkpoint}: the corpora do not hold the bytes that the run read until step {record.step}: "
            f"their digest is {digest}, and the run's is {record.digest}"
        )
    say(
        f"{past.checkpoint}: the run read exactly what it should have read until step {record.step}: "
        f"{count(record.next_sequence, 'sequence')} of {count(length, 'byte')}, digest {digest}"
    )
    return {
        "checkpoint": str(past.checkpoint),
        "step": record.step,
        "sequences": record.next_sequence,
        "sequence_length": length,
        "digest": digest,
    }
