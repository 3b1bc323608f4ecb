"""The commands that look after a run's checkpoints."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pretrain import argument_types as types
from pretrain.checkpoint import (
    CheckpointError,
    CheckpointStore,
    InvalidCheckpointError,
    Location,
    Metadata,
    Url,
    locate,
    read_metadata,
    verify,
)
from pretrain.console import display, printable, say
from pretrain.exports import export, is_export
from pretrain.progress import size
from pretrain.run_folder import RunFolder
from pretrain.run_status import check_run
from pretrain.stop import stopping_at_once
from pretrain.tracking.journal import read_journal
from pretrain.weights import find_checkpoint, is_checkpoint, store_of

app = typer.Typer(help="Look after the checkpoints of a run.", no_args_is_help=True)

RunPath = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="A run folder, or the URL of its checkpoints.", show_default=False, parser=types.location
    ),
]
RunOrCheckpoint = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="A run (all its checkpoints) or a checkpoint: folder or URL.",
        show_default=False,
        parser=types.location,
    ),
]


BITS_PER_BYTE = ("train/bits_per_byte", "validation/bits_per_byte")
"""Of the journal: of a step's batch, and of the validation corpus."""


@app.command("list")
def list_command(
    run: RunPath, as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False
) -> None:
    """The checkpoints of a run, oldest first. Their metadata is checked, their data is not read."""
    facts = [_facts(path) for path in _of_run(run).committed()]
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    table = Table(title=escape(printable(run)), title_justify="left")
    for name in ("step", "written", "size", "ranks", "engine", "state"):
        table.add_column(name, justify="right" if name in ("step", "size", "ranks") else "left")
    for fact in facts:
        fault = fact["fault"]
        told = ["", "", ""] if fault else [size(fact["bytes"]), str(fact["ranks"]), fact["engine"]]
        table.add_row(str(fact["step"]), fact["written"], *told, escape(fault) if fault else "whole")
    Console().print(table)


@app.command("verify")
@stopping_at_once(display.close)
def verify_command(path: RunOrCheckpoint) -> None:
    """Read every byte of a run's checkpoints, or of one, and compare digests; exit code 1 if one is not valid."""
    invalid = 0
    for checkpoint in _chosen(path):
        try:
            with display.phase(f"verifying {checkpoint.name}") as phase:
                verify(checkpoint, progress=phase.update)
            say(f"{checkpoint}: every byte is as it was written")
        except InvalidCheckpointError as error:
            say(f"{checkpoint}: not valid: {error}")
            invalid += 1
    if invalid:
        raise CheckpointError(f"{invalid} of the checkpoints are not valid")


@app.command("show")
def show_command(
    path: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="A run (its newest) or a checkpoint: folder or URL.",
            show_default=False,
            parser=types.location,
        ),
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor as well.")] = False,
) -> None:
    """What is in a checkpoint: what the run had read, its recipe's main numbers, versions, tensors."""
    metadata = read_metadata(_chosen(path)[-1])
    state = metadata.state
    elements: Counter[str] = Counter()
    for name, tensor in metadata.tensors.items():
        elements[name.partition("/")[0]] += math.prod(tensor.shape)
    table = Table(title=escape(printable(str(metadata.folder))), show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    rows = {
        "step": f"{state['reading']['step']:,} of {state['config']['train']['steps']:,}",
        "sequences read": f"{state['reading']['next_sequence']:,}",
        "model": state["config"]["model"]["family"],
        "engine": state["config"]["engine"]["name"],
        "stream": state["fingerprint"],
        **{f"{kind} (fp32)": f"{count:,} numbers" for kind, count in elements.items()},
        **{name: str(value) for name, value in state["environment"].items()},
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    out = Console()
    out.print(table)
    if tensors:
        for name, tensor in metadata.tensors.items():
            out.print(f"{name} {list(tensor.shape)}", markup=False, highlight=False)


@app.command("prune")
def prune_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", parser=types.path)],
    keep: Annotated[int, typer.Option(min=1, help="The newest that stay.")],
    keep_every: Annotated[
        int | None, typer.Option(min=1, help="Those of multiples of so many steps stay as well.")
    ] = None,
) -> None:
    """Delete old checkpoints of a run that nobody trains now. Only valid ones count among those that stay."""
    check_run(run)
    with RunFolder(run).locked():
        store = CheckpointStore(RunFolder(run).checkpoints, keep, keep_every=keep_every)
        for path in store.prune():
            say(f"deleted {path.name}")
        say(f"{len(store.committed())} checkpoints stay in {run}")


@app.command("export")
@stopping_at_once(display.close)
def export_command(
    path: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="A run (its newest valid) or a checkpoint: folder or URL.",
            show_default=False,
            parser=types.location,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to make.", show_default=False, parser=types.path)],
) -> None:
    """Write a checkpoint's weights as safetensors and a card in JSON, for other programs and for initialize.weights."""
    with display.phase("verifying the checkpoint") as phase:
        checkpoint = find_checkpoint(path, progress=phase.update)
    if is_export(Path(path)):
        raise CheckpointError(f"{path} is an export already")
    card = export(checkpoint, out, _bits_per_byte(checkpoint))
    say(f"{out}: {card['parameters']:,} parameters of step {card['step']:,}, in {', '.join(card['files'])}")


def _bits_per_byte(checkpoint: Metadata) -> dict[str, float]:
    """What the journal of the checkpoint's run last said at its step; nothing if the checkpoint lies elsewhere."""
    if isinstance(checkpoint.folder, Url):
        return {}
    metrics = RunFolder(checkpoint.folder.parent.parent).metrics
    last: dict[str, float] = {}
    for record in read_journal(metrics):
        if record["step"] <= checkpoint.state["reading"]["step"]:
            last |= {name.removesuffix("/bits_per_byte"): record[name] for name in BITS_PER_BYTE if name in record}
    return last


def _of_run(run: str) -> CheckpointStore:
    store = store_of(locate(run))
    if not store.committed():
        raise CheckpointError(f"{run} is no run that has a checkpoint")
    return store


def _chosen(path: str) -> list[Location]:
    place = locate(path)
    return [place] if is_checkpoint(place) else _of_run(path).committed()


def _facts(path: Location) -> dict[str, Any]:
    """Of a checkpoint, as JSON."""
    facts: dict[str, Any] = {"folder": str(path), "step": int(path.name.removeprefix("step-"))}
    try:
        metadata = read_metadata(path)
    except CheckpointError as error:
        return facts | {"fault": str(error), "written": ""}
    return facts | {
        "fault": None,
        "written": metadata.written,
        "bytes": sum(file.bytes for file in metadata.files),
        "ranks": len(metadata.files),
        "engine": metadata.state["config"]["engine"]["name"],
    }
