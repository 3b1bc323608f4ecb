"""The commands that make corpora."""

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from data_pipeline.documents import MODALITIES
from data_pipeline.errors import CorpusError
from data_pipeline.prepare import PrepareOptions, PrepareReport, Task, prepare
from data_pipeline.readers import ReadOptions
from data_pipeline.readers.options import Reader
from data_pipeline.repair import repair as repair_corpus
from data_pipeline.shards import Corpus
from data_pipeline.sources import Selection
from data_pipeline.verify import verify
from data_pipeline.withdraw import withdraw
from data_pipeline.withdrawn import FILE as WITHDRAWN_FILE
from launchers.array import submit_commands
from launchers.cluster import ClusterConfig, ClusterError, load_cluster
from launchers.scheduler import cancel
from pretrain import argument_types as types
from pretrain.console import display, printable, said, say
from pretrain.progress import duration, size

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)

BYTELOOM = (sys.executable, "-P", "-m", "pretrain.entry")
OF_THE_ARRAY = {"tasks", "parallel", "cluster", "partition", "account", "memory", "time_limit"}
OF_THE_SUBMISSION = {*OF_THE_ARRAY, "workers", "task", "of", "merge", "slurm"}
"""Parameters of `prepare` that a task is not given, or not as they are."""


def _option(panel: str, text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


FILES, READING, CORPUS, WORK, ARRAY = "Which files", "How they are read", "The corpus", "The work", "On a Slurm cluster"


@app.command("prepare")
def prepare_command(
    context: typer.Context,
    sources: Annotated[
        list[str],
        typer.Argument(help="Files, folders to search, and URLs of either.", show_default=False, parser=types.location),
    ],
    out: Annotated[Path, _option(CORPUS, "The corpus folder to make.", show_default=False, parser=types.path)],
    include: Annotated[list[str] | None, _option(FILES, "Take only files matching this glob (repeatable).")] = None,
    exclude: Annotated[list[str] | None, _option(FILES, "Leave out files and folders matching this glob.")] = None,
    gitignore: Annotated[bool, _option(FILES, "Leave out what git would.", "--gitignore")] = Selection.gitignore,
    max_documents: Annotated[
        int | None, _option(FILES, "Documents of each source, at most: the first of the listing.")
    ] = None,
    max_bytes: Annotated[int | None, _option(FILES, "Raw bytes of each source, at most: its first documents.")] = None,
    deduplicate: Annotated[
        bool, _option(FILES, "Keep one of documents with the same bytes, and split by content.", "--deduplicate")
    ] = PrepareOptions.deduplicate,
    skip_bad: Annotated[
        bool, _option(FILES, "Leave out documents that cannot be read, and report them.", "--skip-bad")
    ] = PrepareOptions.skip_bad,
    reader: Annotated[
        Reader,
        _option(READING, "What files are taken for; auto goes by suffix, files takes their bytes as they are."),
    ] = ReadOptions.reader,
    text_field: Annotated[
        str, _option(READING, "Field of JSON lines or column of Parquet that is the document.", "--field")
    ] = ReadOptions.field,
    member: Annotated[
        list[str] | None, _option(READING, "Suffix of tar members to take (repeatable); all when left out.")
    ] = None,
    image_size: Annotated[
        int | None, _option(READING, "Scale the centre square of images to a side of so many pixels.")
    ] = ReadOptions.image_size,
    image_filter: Annotated[
        Literal["lanczos", "box"], _option(READING, "How images are scaled.")
    ] = ReadOptions.image_filter,
    image_scan: Annotated[
        Literal["raster", "patch"], _option(READING, "Order of an image's bytes: row by row, or tile by tile.")
    ] = ReadOptions.image_scan,
    patch_size: Annotated[
        int, _option(READING, "Bytes of a tile of the patch scan: three times a square number.")
    ] = ReadOptions.patch_size,
    audio_rate: Annotated[
        int | None, _option(READING, "Samples a second that sound is resampled to; its own when left out.")
    ] = ReadOptions.audio_rate,
    mono: Annotated[bool, _option(READING, "Mix the channels of sound into one.", "--mono")] = False,
    skip_binary: Annotated[
        bool, _option(READING, "Leave out files that are no UTF-8 text.", "--skip-binary")
    ] = ReadOptions.skip_binary,
    modality: Annotated[
        str | None, _option(READING, f"Of every document: {', '.join(MODALITIES)}; found by suffix when left out.")
    ] = ReadOptions.modality,
    holdout: Annotated[
        float, _option(CORPUS, "Share of documents, by hash, for OUT/validation; the rest goes to OUT/train.")
    ] = PrepareOptions.holdout,
    seed: Annotated[int, _option(CORPUS, "Changes the shuffle and the held-out documents.")] = PrepareOptions.seed,
    block_bytes: Annotated[int, _option(CORPUS, "Raw bytes of a block, at most.")] = PrepareOptions.block_bytes,
    shard_bytes: Annotated[int, _option(CORPUS, "Raw bytes of a shard, about.")] = PrepareOptions.shard_bytes,
    level: Annotated[int, _option(CORPUS, "zstd compression level.", min=1, max=22)] = PrepareOptions.level,
    workers: Annotated[
        int | None,
        _option(WORK, "Processes to share the work; as many as this machine has processors, or one a task.", min=1),
    ] = None,
    task: Annotated[int, _option(WORK, "Which task of an array this is, from 0. All name the same OUT.")] = 0,
    of: Annotated[int, _option(WORK, "Tasks of the array. May change when work is gone on with.")] = 1,
    merge: Annotated[
        bool, _option(WORK, "Make OUT when all shards are written; or leave it to a call that comes after the array.")
    ] = True,
    slurm: Annotated[
        bool, _option(ARRAY, "Submit an array of tasks, and a merge that comes after it.", "--slurm")
    ] = False,
    tasks: Annotated[int, _option(ARRAY, "Tasks of the array.", min=1)] = 8,
    parallel: Annotated[int | None, _option(ARRAY, "Tasks at once, at most; all when left out.", min=1)] = None,
    cluster: Annotated[str, _option(ARRAY, "A preset (cpu, gpu) or a .yaml file.", parser=types.location)] = "cpu",
    partition: Annotated[str | None, _option(ARRAY, "Slurm's partition.")] = None,
    account: Annotated[str | None, _option(ARRAY, "Whose hours these are.")] = None,
    memory: Annotated[str | None, _option(ARRAY, "Of each task, such as 4G.")] = None,
    time_limit: Annotated[
        str | None, _option(ARRAY, "Of one start of a task, such as 12:00:00; it goes on in another.", "--time")
    ] = None,
) -> None:
    """Turn files into a corpus: tar shards of compressed blocks, with manifest and index.

    Killed or stopped, the same command goes on where it was. Work in progress is in OUT.partial.
    """
    options = PrepareOptions(
        selection=Selection(tuple(include or ()), tuple(exclude or ()), gitignore),
        reading=ReadOptions(
            reader=reader,
            field=text_field,
            members=tuple(member) if member else None,
            image_size=image_size,
            image_filter=image_filter,
            image_scan=image_scan,
            patch_size=patch_size,
            audio_rate=audio_rate,
            audio_channels=1 if mono else None,
            skip_binary=skip_binary,
            modality=modality,
        ),
        holdout=holdout,
        deduplicate=deduplicate,
        max_documents=max_documents,
        max_bytes=max_bytes,
        seed=seed,
        block_bytes=block_bytes,
        shard_bytes=shard_bytes,
        level=level,
        skip_bad=skip_bad,
    )
    if not slurm and (of_the_array := _given(context, OF_THE_ARRAY)):
        raise CorpusError(f"{of_the_array[0].partition('=')[0]} goes with --slurm")
    if slurm:
        asked = {"cpus_per_process": workers or 1, "partition": partition, "account": account}
        asked |= {"memory": memory, "time": time_limit}
        _submit(context, sources, out, tasks, parallel or tasks, load_cluster(cluster, asked))
        return
    started = time.perf_counter()
    try:
        with display.phase("preparing") as phase:
            report = prepare(sources, out, options, phase.update, workers or os.cpu_count() or 1, Task(task, of, merge))
    except KeyboardInterrupt:
        say(f"stopped; {out}.partial keeps what is done, and the same command goes on from there")
        raise typer.Exit(130) from None
    if report is None:
        say(f"all shards are written; the merge makes {out} of them")
        return
    if report.was_finished:
        say(f"{out} is finished already, from the same sources with the same options")
    if report.left_out:
        _show_left_out(report, out)
    for part in report.parts:
        with Corpus(out / part) as corpus:
            say(f"{out / part}: {_in_a_line(corpus)}")
    say(f"{report.documents:,} documents in {duration(time.perf_counter() - started)}")


def _submit(
    context: typer.Context, sources: list[str], out: Path, tasks: int, parallel: int, cluster: ClusterConfig
) -> None:
    """Submits the same command as the tasks of an array, and once more to merge what they made.

    The merge begins however they end: it does what is left, or says why that cannot be done.
    """
    if cluster.scheduler != "slurm":
        raise CorpusError("--cluster names a preset of this machine; leave out --slurm")
    if out.exists():
        raise CorpusError(f"{out} exists already; choose another --out, or remove it first")
    for source in sources:
        if "://" not in source and not Path(source).exists():
            raise CorpusError(f"no such file or folder: {source}")
    names = {option.name or "" for option in context.command.params}
    same = [*BYTELOOM, "prepare", f"--workers={cluster.cpus_per_process}", *_given(context, names - OF_THE_SUBMISSION)]
    each = [[*same, f"--task={number}", f"--of={tasks}", "--no-merge", "--", *sources] for number in range(tasks)]
    jobs = out.with_name(f"{out.name}.jobs")
    array = submit_commands(each, jobs, f"prepare-{out.name}", cluster, parallel)
    try:
        merge = submit_commands([[*same, "--", *sources]], jobs, f"merge-{out.name}", cluster, 1, after=array)
    except ClusterError:
        cancel(array)
        raise
    say(
        f"array {array} of {tasks} tasks, {parallel} at once, prepares {out}; job {merge} merges it; logs are in {jobs}"
    )
    typer.echo(f"{array}\n{merge}")


def _given(context: typer.Context, names: set[str]) -> list[str]:
    """Those of some options that were given to this command, as they could be typed again."""
    words = []
    for option in context.command.params:
        name = option.name or ""
        source = context.get_parameter_source(name)
        if option.param_type_name != "option" or name not in names or source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[name]
        if isinstance(value, bool):
            words.append((option.opts if value else option.secondary_opts)[0])
        else:
            words += [f"{option.opts[0]}={each}" for each in (value if isinstance(value, list | tuple) else [value])]
    return words


@app.command("verify")
def verify_command(
    location: Annotated[
        str,
        typer.Argument(metavar="CORPUS", help="A corpus: a folder or URL.", show_default=False, parser=types.location),
    ],
    repair: Annotated[
        bool, typer.Option("--repair", help="Make a damaged folder whole: index and manifest from the shards.")
    ] = False,
    mirror: Annotated[
        str | None,
        typer.Option(
            help="With --repair: folder or URL of a copy, to take lost blocks and shards from.", parser=types.location
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Shards read at once.")] = os.cpu_count() or 1,
) -> None:
    """Check every byte of a corpus: manifest, index and shards; name each damaged block."""
    if mirror is not None and not repair:
        raise CorpusError("--mirror goes with --repair")
    if repair and "://" in location:
        raise CorpusError(f"{location} is no folder: --repair mends folders; use it where the corpus was made")
    if repair:
        with display.phase("repairing") as phase:
            for line in repair_corpus(Path(location), mirror, threads, phase.update):
                say(line)
    with display.phase("verifying") as phase:
        faults = verify(location, threads, phase.update)
    if faults:
        raise CorpusError("\n".join(faults))
    say(f"{location}: every byte is as it was written")


@app.command("withdraw")
def withdraw_command(
    folder: Annotated[
        Path, typer.Argument(metavar="CORPUS", help="A corpus folder.", show_default=False, parser=types.path)
    ],
    keys: Annotated[list[str] | None, typer.Argument(help="Names of documents.", show_default=False)] = None,
    listed: Annotated[
        Path | None,
        typer.Option("--list", help="File with a name a line; blank lines are skipped.", parser=types.path),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Blocks read at once.")] = os.cpu_count() or 1,
) -> None:
    """Take documents out of a corpus: no run reads them any more. The shards stay as they are."""
    if not keys and listed is None:
        raise typer.BadParameter("name documents, or by --list a file that names them")
    try:
        lines = listed.read_bytes().decode("utf-8", "surrogateescape").split("\n") if listed else []
    except OSError as error:
        raise CorpusError(f"cannot read {listed}: {error}") from error
    wanted = [*(keys or []), *(line for line in lines if line.strip())]
    with Corpus(folder, check_shards=False) as corpus, display.phase("looking for them") as phase:
        new = withdraw(corpus, wanted, threads, phase.update)
    say(f"{len({entry.key for entry in new}):,} documents withdrawn; {folder}/{WITHDRAWN_FILE} lists them")


def _show_left_out(report: PrepareReport, out: Path) -> None:
    table = Table(title=escape(printable(f"left out; {out}/skipped.jsonl names each")), title_justify="left")
    for name in ("source", "reason", "documents"):
        table.add_column(name, justify="right" if name == "documents" else "left")
    for source in report.sources:
        for reason, count in sorted(source.left_out.items()):
            table.add_row(escape(printable(source.name)), reason, f"{count:,}")
    said.print(table)


def _in_a_line(corpus: Corpus) -> str:
    stored = sum(shard["bytes"] for shard in corpus.manifest["shards"])
    return (
        f"{corpus.manifest['documents']:,} documents, {size(corpus.raw_bytes)} in {len(corpus):,} blocks, "
        f"{len(corpus.manifest['shards'])} shards of {size(stored)} in all"
    )
