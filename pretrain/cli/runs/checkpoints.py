"""The `checkpoint` commands: list, verify, show, prune, roll back to and export checkpoints, and their lineage."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from byteloom.core.storage.step_folders import step_of
from byteloom.core.text import count
from pretrain.checkpoint import (
    CheckpointError,
    CheckpointStore,
    InvalidCheckpointError,
    Location,
    Metadata,
    locate,
    read_metadata,
    verify,
)
from pretrain.checkpoint.values import describe_not_finite
from pretrain.cli.arguments import RunFolderArgument, parse_location, parse_path
from pretrain.terminal.console import display, say
from pretrain.terminal.progress import size
from pretrain.terminal.tables import JsonOption, Table, facts, print_json
from pretrain.training.ancestry import ANCESTRY, ancestors_in, describe_ancestry
from pretrain.training.lineage import Weights, lineage_to
from pretrain.training.rollback import roll_back
from pretrain.training.run_folder import RunFolder
from pretrain.training.run_status import check_run
from pretrain.training.stop import stopping_at_once
from pretrain.training.weights import find_checkpoint, is_checkpoint, store_of
from pretrain.training.weights.exports import export, is_export, read_export
from pretrain.training.weights.results import logged_losses

LINEAGE_COLUMNS = ("from", "objective", "digest", "now")
DIGEST_SHOWN = 19
"""Characters of a digest that are shown: the name of the function, a colon, and 12 digits."""

app = typer.Typer(help="List, verify, show, prune, roll back to and export checkpoints.", no_args_is_help=True)

_run_argument = partial(typer.Argument, metavar="RUN", show_default=False, parser=parse_location)


@app.command("list")
def list_command(
    run: Annotated[str, _run_argument(help="Run folder, or URL of its checkpoints.")], as_json: JsonOption = False
) -> None:
    """List the checkpoints of a run, oldest first.

    Checks their metadata, and does not read their data.
    """
    found = [_facts(path) for path in _of_run(run).committed()]
    if as_json:
        print_json(found)
    else:
        described = describe_ancestry(ancestors_in(found[-1]))
        list_table(f"{run}, a {described}" if described else run, found).print()


def list_table(title: str, found: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table with a row for each checkpoint of a run."""
    columns = ["step", "written", "size", "ranks", "engine", "values", "state"]
    table = Table(title, columns, numbers=["step", "size", "ranks"])
    for each in found:
        fault = each["fault"]
        known = [""] * 4 if fault else [size(each["bytes"]), str(each["ranks"]), each["engine"], each["values"]]
        table.add_row(str(each["step"]), each["written"], *known, fault or "intact")
    return table


@app.command("verify")
@stopping_at_once(display.close)
def verify_command(
    path: Annotated[str, _run_argument(help="Run (all its checkpoints) or one checkpoint: folder or URL.")],
) -> None:
    """Verify every byte and every value of checkpoints.

    A valid checkpoint has the bytes that were written, is what its name says, and has finite values. The exit code is 1
    if a checkpoint is not valid.
    """
    invalid = 0
    for checkpoint in _chosen(path):
        try:
            with display.phase(f"verifying {checkpoint.name}") as phase:
                found = verify(checkpoint, progress=phase.update).not_finite
            if found:
                say(f"{checkpoint}: not valid: every byte is as it was written, with {describe_not_finite(found)}")
                invalid += 1
                continue
            say(f"{checkpoint}: valid, every byte is as it was written, and every value is finite")
        except InvalidCheckpointError as error:
            say(f"{checkpoint}: not valid: {error}")
            invalid += 1
    if invalid:
        raise CheckpointError(f"{count(invalid, 'checkpoint is', 'checkpoints are')} not valid")


@app.command("show")
def show_command(
    path: Annotated[str, _run_argument(help="Run (its newest checkpoint) or one checkpoint: folder or URL.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="Also list every tensor.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the contents of a checkpoint."""
    metadata = read_metadata(_chosen(path)[-1])
    if as_json:
        print_json(_contents(metadata, tensors))
        return
    contents_table(metadata).print()
    if tensors:
        print()
        tensors_table(metadata).print()


def contents_table(metadata: Metadata) -> Table:
    """Return a table of the main facts of a checkpoint."""
    state = metadata.state
    described = describe_ancestry(ancestors_in(state))
    rows = {
        **({"ancestry": described} if described else {}),
        "step": f"{state['reading']['step']:,} of {state['config']['train']['steps']:,}",
        "sequences read": f"{state['reading']['next_sequence']:,}",
        "model": state["config"]["model"]["family"],
        "engine": state["config"]["engine"]["name"],
        "stream": state["fingerprint"],
        "values": values_of(metadata),
        **{f"{kind} (fp32)": f"{size:,} numbers" for kind, size in _elements(metadata).items()},
        **{name: str(value) for name, value in state["environment"].items()},
    }
    return facts(str(metadata.folder), rows)


def values_of(metadata: Metadata) -> str:
    """Return what is known about the values of a checkpoint."""
    if metadata.not_finite is None:
        return "unknown"
    return describe_not_finite(metadata.not_finite) if metadata.not_finite else "finite"


def tensors_table(metadata: Metadata) -> Table:
    """Return a table of the name and the shape of each tensor."""
    table = Table("", ["tensor", "shape"])
    for name, tensor in metadata.tensors.items():
        table.add_row(name, str(list(tensor.shape)))
    return table


def _contents(metadata: Metadata, tensors: bool) -> dict[str, Any]:
    """Return the facts of a checkpoint as JSON."""
    state = metadata.state
    contents: dict[str, Any] = {
        "folder": str(metadata.folder),
        "step": state["reading"]["step"],
        "steps": state["config"]["train"]["steps"],
        "sequences_read": state["reading"]["next_sequence"],
        "model": state["config"]["model"]["family"],
        "engine": state["config"]["engine"]["name"],
        "stream": state["fingerprint"],
        "not_finite": metadata.not_finite,
        "elements": _elements(metadata),
        "environment": state["environment"],
        ANCESTRY: state.get(ANCESTRY, []),
    }
    if tensors:
        contents["tensors"] = {name: list(tensor.shape) for name, tensor in metadata.tensors.items()}
    return contents


def _elements(metadata: Metadata) -> dict[str, int]:
    """Return the count of numbers by kind: model and moments."""
    elements: Counter[str] = Counter()
    for name, tensor in metadata.tensors.items():
        elements[name.partition("/")[0]] += math.prod(tensor.shape)
    return dict(elements)


@app.command("prune")
def prune_command(
    run: RunFolderArgument,
    keep: Annotated[int, typer.Option(min=1, help="Newest checkpoints to keep.")],
    keep_every: Annotated[
        int | None, typer.Option(min=1, help="Also keep checkpoints at multiples of this many steps.")
    ] = None,
) -> None:
    """Delete old checkpoints of a run that is not training.

    Only valid checkpoints count as kept.
    """
    check_run(run)
    with RunFolder(run).locked():
        folder = RunFolder(run)
        store = CheckpointStore(folder.checkpoints, keep, keep_every=keep_every, run=folder.run_id())
        for path in store.prune():
            say(f"deleted {path.name}")
        say(f"{count(len(store.committed()), 'checkpoint')} kept in {run}")


@app.command("rollback")
@stopping_at_once(display.close)
def rollback_command(
    run: RunFolderArgument,
    step: Annotated[int, typer.Argument(metavar="STEP", min=1, help="Step to return to.", show_default=False)],
    reason: Annotated[str, typer.Option(help="Reason, for people who look at the run later.", show_default=False)],
) -> None:
    """Return a run to the checkpoint of an earlier step.

    Sets later checkpoints aside, with the reason. The next start resumes from the step. To keep both courses, use
    `byteloom branch`.
    """
    with display.phase(f"verifying the checkpoint of step {step}") as phase:
        rollback = roll_back(run, step, reason, phase.update)
    say(f"{run} is {rollback}; the next start resumes after step {step}")


@app.command("lineage")
def lineage_command(
    path: Annotated[str, _run_argument(help="Run (its newest checkpoint), checkpoint or export: folder or URL.")],
    as_json: JsonOption = False,
) -> None:
    """Show the weights that a model descends from, oldest first.

    They are those of initialize.weights, of `byteloom branch` and of exports. Digests that are stored with the model
    are compared with those that are found now.
    """
    place = locate(path)
    found = read_export(place) if isinstance(place, Path) and is_export(place) else read_metadata(_chosen(path)[-1])
    lines = [each.model_dump(mode="json") | {"now": _state_now(each)} for each in lineage_to(found)]
    if as_json:
        print_json(lines)
        return
    table = Table(f"weights that {path} descends from, and its own, oldest first", ["weights", *LINEAGE_COLUMNS])
    for each in lines:
        origin = "an export" if each["step"] is None else f"{each['name']} at step {each['step']:,}"
        table.add_row(each["place"], origin, each["objective"], each["digest"][:DIGEST_SHOWN], each["now"])
    table.print()


def _state_now(stored: Weights) -> str:
    """Return whether weights are still where they were, with the digest that they had."""
    place = locate(stored.place)
    try:
        is_there = isinstance(place, Path) and is_export(place)
        now = read_export(place) if is_there else read_metadata(place)  # type: ignore[arg-type] # an export is a folder
    except CheckpointError:
        return "not there"
    return "unchanged" if now.digest == stored.digest else "changed"


@app.command("export")
@stopping_at_once(display.close)
def export_command(
    path: Annotated[str, _run_argument(help="Run (its newest valid checkpoint) or one checkpoint: folder or URL.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.", show_default=False, parser=parse_path)],
) -> None:
    """Export the weights of a checkpoint as safetensors.

    Adds a card in JSON. initialize.weights also reads exports.
    """
    with display.phase("verifying the checkpoint") as phase:
        checkpoint = find_checkpoint(path, progress=phase.update)
    if is_export(Path(path)):
        raise CheckpointError(f"{path} is an export already; name a run or a checkpoint")
    card = export(checkpoint, out, logged_losses(checkpoint))
    say(f"{out}: {card['parameters']:,} parameters of step {card['step']:,} in {', '.join(card['files'])}, all finite")


def _of_run(run: str) -> CheckpointStore:
    store = store_of(locate(run))
    if not store.committed():
        raise CheckpointError(f"{run} has no checkpoint")
    return store


def _chosen(path: str) -> list[Location]:
    place = locate(path)
    return [place] if is_checkpoint(place) else _of_run(path).committed()


def _facts(path: Location) -> dict[str, Any]:
    """Return the facts of a checkpoint as JSON."""
    facts: dict[str, Any] = {"folder": str(path), "step": step_of(path)}
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
        "values": values_of(metadata),
        ANCESTRY: metadata.state.get(ANCESTRY, []),
    }
