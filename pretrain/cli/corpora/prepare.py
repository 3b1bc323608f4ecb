"""The command `prepare`, which makes a corpus."""

import os
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from byteloom.core.storage.urls import is_url
from byteloom.core.text import count
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.documents import MODALITIES
from data_pipeline.errors import CorpusError
from data_pipeline.preparation.prepare import PrepareOptions, PrepareReport, Task, prepare, working_folder
from data_pipeline.readers import ReadOptions
from data_pipeline.readers.options import AUTO
from data_pipeline.readers.registry import reader_names
from data_pipeline.sources.listing import Selection
from data_pipeline.sources.roots import expand, is_pipe
from launchers.slurm.array import submit_commands
from launchers.slurm.presets import ClusterConfig, ClusterError, load_cluster
from launchers.slurm.scheduler import cancel
from pretrain.cli.arguments import BYTELOOM_COMMAND, parse_location, parse_path
from pretrain.terminal.console import display, messages, say
from pretrain.terminal.progress import duration, size
from pretrain.terminal.tables import JsonOption, Table, print_json

app = typer.Typer(pretty_exceptions_enable=False)

REPORT_ROWS = 20
"""Most rows of a printed table. OUT/report.json has all."""
ARRAY_OPTIONS = {"tasks", "parallel", "cluster", "partition", "account", "memory", "time_limit"}
SUBMISSION_OPTIONS = {*ARRAY_OPTIONS, "workers", "task", "of", "merge", "slurm"}
"""Parameters of `prepare` that the tasks of an array do not receive unchanged."""


def _option(panel: str, text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


FILES, READING, CORPUS, WORK, ARRAY = "Selection", "Readers", "Corpus", "Work", "Slurm"


@app.command("prepare")
def prepare_command(
    context: typer.Context,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE", help="Files, folders, and URLs of both.", show_default=False, parser=parse_location
        ),
    ],
    out: Annotated[
        Path, _option(CORPUS, "Corpus folder to write; must not exist.", show_default=False, parser=parse_path)
    ],
    include: Annotated[list[str] | None, _option(FILES, "Read only files that match this glob (repeatable).")] = None,
    exclude: Annotated[
        list[str] | None, _option(FILES, "Skip files and folders that match this glob (repeatable).")
    ] = None,
    gitignore: Annotated[
        bool, _option(FILES, "Skip files that .gitignore excludes.", "--gitignore")
    ] = Selection.gitignore,
    max_documents: Annotated[int | None, _option(FILES, "Read at most this many documents of each source.")] = None,
    max_bytes: Annotated[int | None, _option(FILES, "Read at most this many raw bytes of each source.")] = None,
    deduplicate: Annotated[
        bool,
        _option(FILES, "Drop duplicate documents, and split by content.", "--deduplicate"),
    ] = PrepareOptions.deduplicate,
    skip_bad: Annotated[
        bool, _option(FILES, "Skip and report documents that cannot be read.", "--skip-bad")
    ] = PrepareOptions.skip_bad,
    reader: Annotated[
        str,
        _option(
            READING,
            f"Reader of files: {', '.join([AUTO, *reader_names()])}. auto chooses by suffix; files changes no byte.",
            autocompletion=lambda: [AUTO, *reader_names()],
        ),
    ] = ReadOptions.reader,
    text_field: Annotated[
        str, _option(READING, "JSON field or Parquet column of the document.", "--field")
    ] = ReadOptions.field,
    target_field: Annotated[
        str | None, _option(READING, "JSON field of the target, for pairs. --field is then the source.")
    ] = ReadOptions.target_field,
    member: Annotated[
        list[str] | None, _option(READING, "Suffix of tar members to read (repeatable). Default: all.")
    ] = None,
    image_size: Annotated[
        int | None, _option(READING, "Scale the centre square of images to this many pixels a side.")
    ] = ReadOptions.image_size,
    image_filter: Annotated[
        Literal["lanczos", "box"], _option(READING, "Filter that scales images.")
    ] = ReadOptions.image_filter,
    image_scan: Annotated[
        Literal["raster", "patch"],
        _option(READING, "Order of an image's bytes: by row, or by tile."),
    ] = ReadOptions.image_scan,
    patch_size: Annotated[
        int, _option(READING, "Bytes of a tile of the patch scan: 3 times a square.")
    ] = ReadOptions.patch_size,
    audio_rate: Annotated[
        int | None, _option(READING, "Resample sound to this rate in Hz. Default: keep the rate.")
    ] = ReadOptions.audio_rate,
    mono: Annotated[bool, _option(READING, "Mix the channels of sound into one.", "--mono")] = False,
    skip_binary: Annotated[
        bool, _option(READING, "Skip files that are not UTF-8 text.", "--skip-binary")
    ] = ReadOptions.skip_binary,
    modality: Annotated[
        str | None, _option(READING, f"Modality of all documents: {', '.join(MODALITIES)}. Default: by suffix.")
    ] = ReadOptions.modality,
    kind: Annotated[
        list[str] | None,
        _option(READING, f"Keep only documents of this kind (repeatable): {', '.join(MODALITIES)}. Default: all."),
    ] = None,
    holdout: Annotated[
        float, _option(CORPUS, "Share of documents for OUT/validation, chosen by hash; the rest is OUT/train.")
    ] = PrepareOptions.holdout,
    seed: Annotated[int, _option(CORPUS, "Seed of the shuffle and of the holdout.")] = PrepareOptions.seed,
    block_bytes: Annotated[int, _option(CORPUS, "Largest size of a block, in raw bytes.")] = PrepareOptions.block_bytes,
    shard_bytes: Annotated[
        int, _option(CORPUS, "Approximate size of a shard, in raw bytes.")
    ] = PrepareOptions.shard_bytes,
    level: Annotated[int, _option(CORPUS, "zstd compression level.", min=1, max=22)] = PrepareOptions.level,
    workers: Annotated[
        int | None,
        _option(WORK, "Number of processes. Default: one for each processor; with --slurm, one for each task.", min=1),
    ] = None,
    task: Annotated[int, _option(WORK, "Index of this task in an array, from 0. All tasks share OUT.")] = 0,
    of: Annotated[int, _option(WORK, "Number of tasks of the array. May change on resuming.")] = 1,
    merge: Annotated[bool, _option(WORK, "Make OUT once all shards are written, or leave it to a later call.")] = True,
    slurm: Annotated[
        bool, _option(ARRAY, "Submit an array of tasks, and a job that merges their results.", "--slurm")
    ] = False,
    tasks: Annotated[int, _option(ARRAY, "Number of tasks of the array.", min=1)] = 8,
    parallel: Annotated[int | None, _option(ARRAY, "Most tasks that run at once. Default: all.", min=1)] = None,
    cluster: Annotated[
        str, _option(ARRAY, "Cluster preset (cpu, gpu) or a .yaml file.", parser=parse_location)
    ] = "cpu",
    partition: Annotated[str | None, _option(ARRAY, "Slurm partition.")] = None,
    account: Annotated[str | None, _option(ARRAY, "Slurm account to charge.")] = None,
    memory: Annotated[str | None, _option(ARRAY, "Memory of each task, such as 4G.")] = None,
    time_limit: Annotated[
        str | None,
        _option(
            ARRAY,
            "Time limit of a task, such as 12:00:00. A task that needs longer restarts.",
            "--time",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Turn files into a corpus of tar shards.

    If the command is stopped or killed, run it again to resume.
    OUT.partial holds the work in progress.
    """
    options = PrepareOptions(
        selection=Selection(tuple(include or ()), tuple(exclude or ()), gitignore),
        reading=ReadOptions(
            reader=reader,
            field=text_field,
            target_field=target_field,
            members=tuple(member) if member else None,
            image_size=image_size,
            image_filter=image_filter,
            image_scan=image_scan,
            patch_size=patch_size,
            audio_rate=audio_rate,
            audio_channels=1 if mono else None,
            skip_binary=skip_binary,
            modality=modality,
            kinds=tuple(kind) if kind else None,
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
    if not slurm and (given := _given(context, ARRAY_OPTIONS)):
        raise CorpusError(f"{given[0].partition('=')[0]} needs --slurm")
    if slurm and as_json:
        raise CorpusError("--json does not work with --slurm, which prints the ids of the jobs")
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
        say(f"stopped; {out}.partial holds the work that is done, and the same command continues")
        raise typer.Exit(130) from None
    if report is None:
        say(f"all shards are written; a call with --merge makes {out} of them")
        if as_json:
            print_json(None)
        return
    if report.was_finished:
        say(f"{out} exists already, made from the same sources with the same options")
        if report.changed:
            say(
                f"{', '.join(report.changed)} changed since: {out} has the old content; remove it, or choose another "
                "--out, to prepare the new one"
            )
    for table in (kinds_table(report), left_out_table(report, out)):
        if table is not None:
            table.print(messages)
    for part in report.parts:
        with Corpus(out / part) as corpus:
            say(f"{out / part}: {_summary(corpus)}")
    say(f"{count(report.documents, 'document')} in {duration(time.perf_counter() - started)}")
    if as_json:
        print_json(report.as_json())


def _submit(
    context: typer.Context, sources: list[str], out: Path, tasks: int, parallel: int, cluster: ClusterConfig
) -> None:
    """Submit this command as the tasks of an array, and as a job that merges their results.

    The merge runs even if tasks fail: it does the remaining work, or reports why it cannot.
    """
    if cluster.scheduler != "slurm":
        raise CorpusError("--cluster names a preset for this machine, not for Slurm; leave out --slurm")
    working_folder(out)
    if out.exists():
        raise CorpusError(f"{out} exists already; choose another --out, or remove that folder first")
    for source in sources:
        for place in expand(source):
            if not is_url(place) and not is_pipe(place) and not Path(place).exists():
                raise CorpusError(f"no such file or folder: {place}")
    names = {option.name or "" for option in context.command.params}
    given = _given(context, names - SUBMISSION_OPTIONS)
    same = [*BYTELOOM_COMMAND, "prepare", f"--workers={cluster.cpus_per_process}", *given]
    each = [[*same, f"--task={number}", f"--of={tasks}", "--no-merge", "--", *sources] for number in range(tasks)]
    jobs = out.with_name(f"{out.name}.jobs")
    array = submit_commands(each, jobs, f"prepare-{out.name}", cluster, parallel)
    try:
        merge = submit_commands([[*same, "--", *sources]], jobs, f"merge-{out.name}", cluster, 1, after=array)
    except ClusterError:
        cancel(array)
        raise
    say(
        f"array {array} of {count(tasks, 'task')}, {parallel} at once, prepares {out}; job {merge} merges the results; "
        f"logs are in {jobs}"
    )
    typer.echo(f"{array}\n{merge}")


def _given(context: typer.Context, names: set[str]) -> list[str]:
    """Return the options of some names that were typed, as words of a command line."""
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


def kinds_table(report: PrepareReport) -> Table | None:
    """Return a table of the documents by suffix and kind; None if there is one row, which the summary already has."""
    if len(report.kinds) < 2:
        return None
    table = Table("documents by suffix", ["suffix", "kind", "documents", "bytes", "examples"], ["documents", "bytes"])
    for kind in report.kinds[:REPORT_ROWS]:
        examples = ", ".join(kind.examples)
        table.add_row(kind.suffix or "(none)", kind.modality, f"{kind.documents:,}", size(kind.raw_bytes), examples)
    if rest := report.kinds[REPORT_ROWS:]:
        documents, raw_bytes = (sum(getattr(kind, name) for kind in rest) for name in ("documents", "raw_bytes"))
        table.add_row("others", "", f"{documents:,}", size(raw_bytes), "report.json has all")
    return table


def left_out_table(report: PrepareReport, out: Path) -> Table | None:
    """Return a table of the documents that were left out, by suffix and reason; None if there is none."""
    if not report.left_out:
        return None
    title = f"left out; {out}/skipped.jsonl names each"
    table = Table(title, ["suffix", "reason", "documents", "examples"], ["documents"])
    for kind in report.left_out_kinds[:REPORT_ROWS]:
        table.add_row(kind.suffix or "(none)", kind.reason, f"{kind.documents:,}", ", ".join(kind.examples))
    if rest := report.left_out - sum(kind.documents for kind in report.left_out_kinds[:REPORT_ROWS]):
        over = sum(source.left_out["over the limit"] for source in report.sources)
        if over:
            table.add_row("all", "over the limit", f"{over:,}", "")
        if rest > over:
            table.add_row("others", "", f"{rest - over:,}", "report.json has all")
    return table


def _summary(corpus: Corpus) -> str:
    shards = corpus.manifest["shards"]
    stored = sum(shard["bytes"] for shard in shards)
    return (
        f"{count(corpus.manifest['documents'], 'document')}, {size(corpus.raw_bytes)} in "
        f"{count(len(corpus), 'block')}, {count(len(shards), 'shard')} of {size(stored)} in total"
    )
