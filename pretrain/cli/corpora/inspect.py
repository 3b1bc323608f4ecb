"""The `inspect` command: contents of a corpus, origin of a row of a run, proof of what a run read."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from byteloom.core.text import count, printable
from byteloom.stream import PastReading, past_reading
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.errors import CorpusError
from data_pipeline.media import CARD_FIELD, MediaCard
from data_pipeline.stream.inspection.explain import explain
from data_pipeline.stream.reading import Reading, replay
from data_pipeline.vocabulary import PADDING, SEPARATOR
from pretrain.checkpoint import CheckpointError
from pretrain.cli.arguments import parse_location
from pretrain.terminal.console import display, say
from pretrain.terminal.tables import JsonOption, Table, facts, print_json, print_lines
from pretrain.training.ancestry import ancestor_at, describe_ancestry

app = typer.Typer()


@app.command("inspect")
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
    digest: Annotated[
        bool, typer.Option("--digest", help="For a corpus: print only its digest, for data.shards_sha256.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the contents of a corpus, or the data that a run read.

    For a run, show the origin of a row (--step, --row), or prove what the run read (--replay).
    """
    if step is None and not replay:
        if any((Path(path) / name).exists() for name in ("run.json", "metadata.json")):
            raise CorpusError(f"{path} is a run, not a corpus: add --step and --row, or --replay")
        with Corpus(path) as corpus:
            if digest and not as_json:
                typer.echo(corpus.digest)
            elif as_json:
                print_json(corpus_facts(corpus))
            else:
                corpus_table(corpus.location, corpus_facts(corpus)).print()
                _show_sample(corpus, sample)
        return
    past = past_reading(path, overrides or [])
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
        "digest": corpus.digest,
        **({CARD_FIELD: corpus.card.as_json()} if corpus.card is not None else {}),
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
            **({CARD_FIELD: str(MediaCard.from_json(found[CARD_FIELD]))} if CARD_FIELD in found else {}),
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
    ancestor = ancestor_at(past.ancestors, step)
    return {
        "step": step,
        "row": row,
        "sequence": sequence,
        "skipped": past.reading.skipped_at(step),
        "source": source,
        "number": number,
        "corpus": mixture.streams[source].corpus.location,
        "ids": len(ids),
        "separators": int((ids == SEPARATOR).sum()),
        "padding": int((ids == PADDING).sum()),
        **({"ancestor": ancestor.name} if ancestor else {}),
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
    """Return the number of separators and paddings of a row, the ancestor that read it, and what its step skipped."""
    ranges = ", ".join(f"{first} to {first + length - 1}" for first, length in found["skipped"])
    skipped = f"; the step skipped sequences {ranges} (see `byteloom health`)" if ranges else ""
    read_by = f"; read as run {found['ancestor']}, which this run continues" if "ancestor" in found else ""
    return (
        f"{count(found['ids'], 'id')}: {count(found['separators'], 'separator')} between documents, "
        f"{found['padding']:,} padding{read_by}{skipped}"
    )


def _without(reading: Reading) -> str:
    """Return a clause about the sequences that a run has skipped; empty if it has skipped none."""
    skipped = reading.skips.before(reading.record.next_sequence)
    return f", without {count(skipped, 'skipped sequence')}" if skipped else ""


def _prove(past: PastReading, threads: int) -> dict[str, Any]:
    """Read again the data that a run read, and compare digests.

    Raises:
        CheckpointError: the corpora hold other bytes.
    """
    record, length = past.reading.record, past.reading.mixture.sequence_length
    sequences = past.reading.sequences_read
    with display.phase("reading again", sequences * length) as phase:
        digest = replay(past.reading, threads, lambda sequences: phase.advance(sequences * length))
    if digest != record.digest:
        raise CheckpointError(
            f"{past.checkpoint}: the corpora do not hold the bytes that the run read until step {record.step}: "
            f"their digest is {digest}, and the run's is {record.digest}"
        )
    branch = f"; it is a {describe_ancestry(past.ancestors)}" if past.ancestors else ""
    say(
        f"{past.checkpoint}: the run read exactly what it should have read until step {record.step}: "
        f"{count(sequences, 'sequence')} of {count(length, 'byte')}{_without(past.reading)}, digest {digest}{branch}"
    )
    return {
        "checkpoint": str(past.checkpoint),
        "step": record.step,
        "sequences": sequences,
        "skipped": record.skipped,
        "sequence_length": length,
        "digest": digest,
    }
