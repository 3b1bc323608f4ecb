"""The `byteloom` command."""

import contextlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from data_pipeline.errors import CorpusError
from data_pipeline.prepare import PrepareOptions, prepare
from data_pipeline.shards import Corpus
from data_pipeline.verify import verify as verify_corpus
from launchers.local import run_in_process
from pretrain import config as configuration
from pretrain.checkpoint import CheckpointError, CheckpointStore, Metadata, read, verify
from pretrain.config import Config, ConfigError
from pretrain.engines import EngineError, choose_device, compute_dtype
from pretrain.evaluate import Evaluation, EvaluationError, Mode, Score, evaluate_model, stride_of
from pretrain.fragments import whole
from pretrain.generate import Sampling, SamplingError, generate
from pretrain.models import ByteModel, PerceiverARConfig, build_model, families, model_config
from pretrain.progress import duration, size
from pretrain.recipes import recipe_sizes
from pretrain.run_folder import RunFolder, RunFolderError
from pretrain.tracking import MlflowShipper
from pretrain.train import TrainingError, train

app = typer.Typer(
    name="byteloom",
    help="Pretrain models on raw bytes: files to shards, shards to a model, checkpoints that resume to the byte.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
config_app = typer.Typer(help="What a recipe says and may say.", no_args_is_help=True)
app.add_typer(config_app, name="config")

said = Console(stderr=True)
"""Everything for people; results go to standard output."""

RecipePath = Annotated[Path, typer.Argument(help="A recipe, such as configs/debug.yaml.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Fields to change, such as train.steps=50 model.patch_size=4.", show_default=False),
]
ModelPath = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder (its newest checkpoint) or a checkpoint folder.")
]


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


class Grouping(StrEnum):
    folder = "folder"
    suffix = "suffix"
    document = "document"
    none = "none"

    def group_of(self, key: str) -> str:
        """The group of a document's key."""
        return {
            "folder": key.rpartition("/")[0] or ".",
            "suffix": Path(key).suffix or "(none)",
            "document": key,
            "none": "all",
        }[self.value]


DeviceOption = Annotated[Device, typer.Option(help="Where to compute; auto takes CUDA where there is one.")]
PrecisionOption = Annotated[Precision | None, typer.Option(help="The run's own when left out.")]
LatentsOption = Annotated[
    int | None,
    typer.Option(min=1, help="Of a Perceiver AR: more predict better, fewer faster. The run's own when left out."),
]


@app.command("prepare")
def prepare_command(
    paths: Annotated[list[Path], typer.Argument(help="Files, and folders to search.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The corpus folder to make.", show_default=False)],
    include: Annotated[list[str] | None, typer.Option(help="Take only files matching this glob (repeatable).")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Leave out files and folders matching this glob.")] = None,
    holdout: Annotated[
        float,
        typer.Option(help="Share of documents, by hash, for OUT/validation; the rest goes to OUT/train."),
    ] = PrepareOptions.holdout,
    seed: Annotated[int, typer.Option(help="Changes the shuffle and the held-out documents.")] = PrepareOptions.seed,
    block_bytes: Annotated[int, typer.Option(help="Raw bytes of a block, at most.")] = PrepareOptions.block_bytes,
    shard_bytes: Annotated[int, typer.Option(help="Bytes of a shard, about.")] = PrepareOptions.shard_bytes,
    level: Annotated[int, typer.Option(min=1, max=22, help="zstd compression level.")] = PrepareOptions.level,
    skip_unreadable: Annotated[bool, typer.Option(help="Leave out files that cannot be read, and list them.")] = False,
) -> None:
    """Turn files into a corpus: tar shards of compressed blocks, with manifest and index."""
    options = PrepareOptions(
        include=include or (),
        exclude=exclude or (),
        holdout=holdout,
        seed=seed,
        block_bytes=block_bytes,
        shard_bytes=shard_bytes,
        level=level,
        skip_unreadable=skip_unreadable,
    )
    started = time.perf_counter()
    with _byte_progress("preparing") as bar:
        task = bar.add_task("", total=None)
        report = prepare(paths, out, options, lambda done, total: bar.update(task, completed=done, total=total))
    for path, reason in report.unreadable:
        _say(f"left out: {path}: {reason}")
    if report.empty:
        _say(f"left out: {report.empty} empty files")
    for folder in report.folders:
        _say(f"{folder}: {_in_a_line(Corpus(folder))}")
    _say(f"{report.documents:,} documents in {duration(time.perf_counter() - started)}")


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A corpus folder.", show_default=False)],
    sample: Annotated[int, typer.Option(min=0, help="Bytes of a document to show.")] = 400,
) -> None:
    """Show what is in a corpus: documents, bytes, blocks, compression, and the beginning of a document."""
    with Corpus(folder) as corpus:
        manifest, index = corpus.manifest, corpus.index
        stored = int(index["frame_bytes"].sum())
        table = Table(title=escape(_printable(str(folder))), show_header=False, title_justify="left")
        for name, value in (
            ("documents", f"{manifest['documents']:,}"),
            ("raw bytes", f"{corpus.raw_bytes:,}"),
            ("bytes a document", f"{corpus.raw_bytes / manifest['documents']:,.0f} (mean)"),
            ("blocks", f"{len(corpus):,} of {int(index['raw_bytes'].max()):,} bytes at most"),
            ("shards", f"{len(manifest['shards']):,}"),
            ("compressed", f"{stored:,} bytes, {corpus.raw_bytes / stored:.2f} to 1"),
            ("content sha256", corpus.content_sha256),
        ):
            table.add_row(name, value)
        out = Console()
        out.print(table)
        if sample:
            block = corpus.read(0)
            first = block.slices[0]
            shown = block.raw[first.start : first.start + min(sample, first.length)]
            out.print(_printable(f"\n{first.key} ({first.modality}) begins:"), markup=False, highlight=False)
            out.print(shown.decode("utf-8", "backslashreplace"), markup=False, highlight=False)


@app.command("verify")
def verify_command(
    folder: Annotated[Path, typer.Argument(help="A corpus folder.", show_default=False)],
    threads: Annotated[int, typer.Option(min=1, help="Shards read at once.")] = os.cpu_count() or 1,
) -> None:
    """Check every byte of a corpus: manifest, index and shards; name each damaged block."""
    with _byte_progress("verifying") as bar:
        task = bar.add_task("", total=sum(path.stat().st_size for path in folder.glob("*.tar")))
        faults = verify_corpus(folder, threads, lambda done: bar.advance(task, done))
    if faults:
        raise CorpusError("\n".join(faults))
    _say(f"{folder}: every byte is as it was written")


@app.command("train")
def train_command(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Train a run, or go on with it where its newest checkpoint is."""
    config = configuration.load(recipe, overrides or [])
    with tempfile.TemporaryDirectory(prefix="byteloom-") as folder:
        resolved = Path(folder) / "recipe.yaml"
        resolved.write_text(config.as_yaml(), encoding="utf-8")
        raise typer.Exit(run_in_process("pretrain.cli:start", resolved))


def start(recipe: Path) -> int:
    """The train entry that launchers call by name, once a rank."""
    return train(configuration.load(recipe), said)


@app.command("eval")
def eval_command(
    model: ModelPath,
    shards: Annotated[
        Path | None, typer.Argument(help="A corpus folder; the run's own validation corpus when left out.")
    ] = None,
    mode: Annotated[
        Mode, typer.Option(help="What a byte is predicted from; its window alone, unless said otherwise.")
    ] = Mode.windows,
    by: Annotated[Grouping, typer.Option(help="How documents are grouped.")] = Grouping.folder,
    rows: Annotated[int, typer.Option(min=1, help="Windows scored at once.")] = 16,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Bytes scored at the end of each window; fewer give each more context, at more cost. The mode's own "
            "when left out.",
        ),
    ] = None,
    latents: LatentsOption = None,
    device: DeviceOption = Device.auto,
    precision: PrecisionOption = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here as well.")] = None,
) -> None:
    """Bits per byte of a checkpoint on a corpus, by group of documents."""
    loaded, checkpoint = _load_model(model, device, precision, latents)
    stride = stride or stride_of(loaded, mode)
    own = checkpoint.state["config"]["validation"]["shards"]
    if shards is None and own is None:
        raise CorpusError(f"{model} was trained without a validation corpus; name one")
    chosen = shards or Path(own)
    with Corpus(chosen) as corpus, _byte_progress("scoring") as bar:
        task = bar.add_task("", total=corpus.raw_bytes)
        result = evaluate_model(loaded, corpus, mode, rows, by.group_of, lambda done: bar.advance(task, done), stride)
    _print_scores(
        result,
        f"{checkpoint.folder} on {chosen}, mode {mode}: windows of {loaded.sequence_length:,} from each document's "
        f"start, {stride:,} bytes of each scored",
    )
    if json_path is not None:
        scores = {
            "mode": mode.value,
            "sequence_length": loaded.sequence_length,
            "stride": stride,
            "total": _as_json(result.total),
            "groups": {n: _as_json(s) for n, s in result.groups.items()},
        }
        json_path.write_text(json.dumps(scores, indent=1), encoding="utf-8")


@app.command("generate")
def generate_command(
    model: ModelPath,
    prompt: Annotated[str, typer.Option(help="Text the model goes on from.")] = "",
    prompt_file: Annotated[Path | None, typer.Option(help="File whose bytes the model goes on from.")] = None,
    count: Annotated[int, typer.Option("--bytes", min=1, help="Bytes to write, at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest byte.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the k likeliest bytes.")] = None,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest that add up to p.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the draws.")] = 0,
    latents: LatentsOption = None,
    device: DeviceOption = Device.auto,
    precision: PrecisionOption = None,
) -> None:
    """Write bytes that follow a prompt to standard output, each as soon as it is drawn.

    Ends early where the model ends the document.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    try:
        start_bytes = prompt_file.read_bytes() if prompt_file else prompt.encode("utf-8", "surrogateescape")
    except OSError as error:
        raise CorpusError(f"cannot read the prompt {prompt_file}: {error.strerror}") from error
    loaded, _ = _load_model(model, device, precision, latents)
    out = sys.stdout.buffer
    started, written = time.perf_counter(), 0
    with contextlib.suppress(BrokenPipeError):  # whoever reads our output has had enough
        for byte in generate(loaded, start_bytes, count, sampling):
            out.write(bytes([byte]))
            out.flush()
            written += 1
    seconds = time.perf_counter() - started
    ending = "" if written == count else ", where the model ended the document"
    _say(f"\n{written} bytes, {written / seconds:.0f} bytes/s{ending}")


@app.command()
def track(run: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)]) -> None:
    """Deliver the numbers of a run that MLflow has not received."""
    folder = RunFolder(run)
    if not folder.mlflow.exists():
        raise RunFolderError(f"{run} has no mlflow.json: it is no run folder, or its run was not tracked")
    with folder.locked():
        shipper = MlflowShipper(folder.metrics, folder.mlflow)
        missing = shipper.undelivered()
        if shipper.delivery.status == "RUNNING":  # whoever wrote that is dead: we hold the run's lock
            shipper.set_status("KILLED")
        try:
            shipper.finish()
        except Exception as error:  # MLflow raises many kinds; the person asked for the delivery and is told
            reason = str(error).partition("\n")[0]
            raise RunFolderError(f"MLflow at {shipper.delivery.uri} cannot be told: {reason}") from error
    _say(f"{missing} steps delivered to {shipper.delivery.uri}")


@app.command("models")
def models_command(
    folder: Annotated[Path, typer.Argument(help="Where the recipes are.")] = Path("configs"),
) -> None:
    """List every model family, with what its recipes build: parameters, the paper's count, forward FLOPs."""
    sizes = recipe_sizes(folder)
    table = Table(caption="FLOPs/byte: of the forward pass over a full row, by the bytes that it reads")
    table.add_column("recipe", overflow="fold")
    for name in ("parameters", "printed", "FLOPs/byte"):
        table.add_column(name, justify="right", no_wrap=True)
    for family, config in families().items():
        table.add_section()
        table.add_row(f"[bold]{family}[/bold]: {config.__doc__}")
        for row in (row for row in sizes if row.family == family):
            name = escape(_printable(str(row.path.relative_to(folder))))
            table.add_row(name, f"{row.parameters:,}", row.printed or "", f"{row.flops_per_byte / 1e6:,.1f} M")
    Console().print(table)


@config_app.command("show")
def config_show(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Print a recipe with its overrides and every default."""
    typer.echo(configuration.load(recipe, overrides or []).as_yaml(), nl=False)


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    typer.echo(json.dumps(Config.model_json_schema(), indent=1))


@config_app.command("explain")
def config_explain(
    field: Annotated[str, typer.Argument(help="Such as model.patch_size, or a section: model.")],
) -> None:
    """Say what a field means, with its type, default and bounds."""
    typer.echo(configuration.explain(field))


def _load_model(
    path: Path, device: Device, precision: Precision | None, latents: int | None
) -> tuple[ByteModel, Metadata]:
    """The model of a run's newest checkpoint, or of one checkpoint, ready to score and generate."""
    if (path / "metadata.json").exists():
        checkpoint: Metadata | None = verify(path)
    else:
        checkpoint = CheckpointStore(RunFolder(path).checkpoints, keep=1).newest_valid(set_aside=False)
    if checkpoint is None:
        raise CheckpointError(f"no valid checkpoint at {path}: it is neither a checkpoint nor a run that has one")
    config = checkpoint.state["config"]
    family = model_config(config["model"])
    if latents is not None:
        if not isinstance(family, PerceiverARConfig):
            raise CheckpointError(f"--latents {latents}: {path} is a {family.family}, which has none")
        if latents > family.sequence_length:
            raise CheckpointError(f"--latents {latents}: more than the sequence length, {family.sequence_length}")
        family = family.model_copy(update={"latents": latents})
    model = build_model(family).eval()
    read(checkpoint, [whole(f"model/{name}", parameter) for name, parameter in model.named_parameters()])
    dtype = compute_dtype(precision.value if precision else config["engine"]["precision"])
    return model.to(choose_device(device.value), dtype), checkpoint


def _say(text: str) -> None:
    """A line for people, as it is: file names are no markup."""
    said.print(_printable(text), markup=False, highlight=False, soft_wrap=True)


def _printable(text: str) -> str:
    """Text in which the bytes of a file name that are no UTF-8 are shown as escapes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _print_scores(result: Evaluation, title: str) -> None:
    table = Table(title=escape(_printable(title)), title_justify="left")
    table.add_column("documents of")
    for name in ("bits/byte", "bytes", "documents"):
        table.add_column(name, justify="right")
    for name, score in sorted(result.groups.items()):
        table.add_row(
            escape(_printable(name)), f"{score.bits_per_byte:.4f}", f"{score.bytes:,}", f"{score.documents:,}"
        )
    total = result.total
    table.add_section()
    table.add_row("all", f"{total.bits_per_byte:.4f}", f"{total.bytes:,}", f"{total.documents:,}")
    Console().print(table)


def _as_json(score: Score) -> dict[str, float]:
    return {"bits_per_byte": score.bits_per_byte, "bytes": score.bytes, "documents": score.documents}


def _in_a_line(corpus: Corpus) -> str:
    stored = sum(shard["bytes"] for shard in corpus.manifest["shards"])
    return (
        f"{corpus.manifest['documents']:,} documents, {size(corpus.raw_bytes)} in {len(corpus):,} blocks, "
        f"{len(corpus.manifest['shards'])} shards of {size(stored)} in all"
    )


@contextlib.contextmanager
def _byte_progress(what: str) -> Iterator[Progress]:
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=said, disable=not said.is_terminal) as bar:
        yield bar


class _ConsoleHandler(logging.Handler):
    """Log lines for people, above a live progress line where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        mark = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        _say(f"{mark}{record.getMessage()}")


def main() -> None:
    """Runs the command; a fault that a person can mend is one line and exit code 1."""
    handler = _ConsoleHandler(logging.INFO)
    for name in ("pretrain", "data_pipeline"):
        logging.getLogger(name).setLevel(logging.DEBUG)
        logging.getLogger(name).addHandler(handler)
    try:
        app()
    except (
        CorpusError,
        ConfigError,
        CheckpointError,
        EngineError,
        EvaluationError,
        RunFolderError,
        SamplingError,
        TrainingError,
    ) as error:
        for line in str(error).splitlines():
            _say(f"error: {line}")
        sys.exit(1)
    except OSError as error:  # a full disk, a folder that may not be written
        _say(f"error: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
