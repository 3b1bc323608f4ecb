"""The commands `verify` and `withdraw`, which maintain a corpus."""

import os
from pathlib import Path
from typing import Annotated

import typer

from byteloom.core.text import count
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.repair import repair as repair_corpus
from data_pipeline.corpus.storage.storage import RemoteConfig
from data_pipeline.corpus.verify import verify
from data_pipeline.corpus.withdraw import withdraw
from data_pipeline.corpus.withdrawn import WITHDRAWN_FILE
from data_pipeline.errors import CorpusError
from pretrain.cli.arguments import parse_location, parse_path
from pretrain.terminal.console import display, say

VERIFY_SECONDS = 20.0
"""Deadline for a file of a corpus at a URL. A person waits, and a file may really be missing."""

app = typer.Typer(pretty_exceptions_enable=False)


@app.command("verify")
def verify_command(
    location: Annotated[
        str,
        typer.Argument(metavar="CORPUS", help="Corpus: folder or URL.", show_default=False, parser=parse_location),
    ],
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Mend a folder: manifest and index from its shards, shards from their blocks."),
    ] = False,
    mirror: Annotated[
        str | None,
        typer.Option(
            help="With --repair: copy of the corpus (folder or URL) to take lost blocks and shards from.",
            parser=parse_location,
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Shards read at once.")] = os.cpu_count() or 1,
) -> None:
    """Check every byte of a corpus, or repair it.

    Computes manifest and index again from the shards, and names each damaged block. The digest in the last line
    identifies the corpus; a recipe can require it (data.shards_sha256).
    """
    if mirror is not None and not repair:
        raise CorpusError("--mirror needs --repair")
    if repair and "://" in location:
        raise CorpusError(
            f"{location} is a URL, and --repair works on folders only; run it on the machine that has the folder"
        )
    if repair:
        with display.phase("repairing") as phase:
            for line in repair_corpus(Path(location), mirror, threads, phase.update):
                say(line)
    with display.phase("verifying") as phase:
        faults = verify(location, threads, phase.update, RemoteConfig(deadline_seconds=VERIFY_SECONDS))
    if faults:
        raise CorpusError("\n".join(faults))
    with Corpus(location, check_shards=False) as corpus:
        say(f"{corpus.location}: intact, every byte is as it was written; digest {corpus.digest}")


@app.command("withdraw")
def withdraw_command(
    folder: Annotated[
        Path, typer.Argument(metavar="CORPUS", help="Corpus folder.", show_default=False, parser=parse_path)
    ],
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="KEY", help="Keys of documents.", show_default=False)
    ] = None,
    listed: Annotated[
        Path | None,
        typer.Option("--list", help="File with one key on each line.", parser=parse_path),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Blocks read at once.")] = os.cpu_count() or 1,
) -> None:
    """Exclude documents of a corpus from all future reading.

    The shards do not change.
    """
    if not keys and listed is None:
        raise typer.BadParameter("no document is named; give keys, or a file of keys with --list")
    try:
        lines = listed.read_bytes().decode("utf-8", "surrogateescape").split("\n") if listed else []
    except OSError as error:
        raise CorpusError(f"cannot read {listed}: {error}") from error
    wanted = [*(keys or []), *(line for line in lines if line.strip())]
    with Corpus(folder, check_shards=False) as corpus, display.phase("searching") as phase:
        new = withdraw(corpus, wanted, threads, phase.update)
    say(f"{count(len({entry.key for entry in new}), 'document')} withdrawn; {folder}/{WITHDRAWN_FILE} lists all")
