"""The `byteloom` command."""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from byteloom.core.packages import MissingPackageError
from byteloom.core.provenance import read_source, save_resolved, trace
from byteloom.core.text import count
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.remote import RemoteConfig
from data_pipeline.errors import CorpusError
from launchers.local import run_processes
from launchers.slurm.presets import ClusterError
from launchers.slurm.scheduler import SchedulerError
from pretrain.checkpoint import CheckpointError, Metadata, read
from pretrain.checkpoint.fence import FencedError
from pretrain.cli import argument_types as types
from pretrain.cli import checkpoints as checkpoint_commands
from pretrain.cli import corpora as corpus_commands
from pretrain.cli import inspection as inspect_commands
from pretrain.cli import models as model_commands
from pretrain.cli import runs as run_commands
from pretrain.cli import submit as submit_command
from pretrain.cli import sweep as sweep_command
from pretrain.cli.arguments import OverridesArgument, RecipeArgument, complete_recipe
from pretrain.cli.submit import TRAIN_ENTRY
from pretrain.cli.versions import print_versions
from pretrain.config import schema as configuration
from pretrain.config.check import check_recipe, print_findings
from pretrain.config.new_recipe import write_copy
from pretrain.config.schema import Config, ConfigError, recipe_schema
from pretrain.distributed.fragments import MODEL, fragment_name, whole
from pretrain.distributed.world import World, WorldError, place_of
from pretrain.engines import EngineError, choose_device, compute_dtype, scoring_precision
from pretrain.evaluation.evaluate import EvaluationError, Mode, evaluate_model, stride_of
from pretrain.evaluation.generation import Sampling, SamplingError, generate_rows
from pretrain.evaluation.report import Report
from pretrain.evaluation.words import count_words
from pretrain.models import ByteModel, PerceiverARConfig, build_model, model_config
from pretrain.models.families.megabyte import Megabyte
from pretrain.terminal import crash
from pretrain.terminal.console import display, run, say, speak_as
from pretrain.terminal.tables import JsonOption, print_json, print_lines
from pretrain.tracking import MlflowShipper, fault_of, shown, store_evaluation
from pretrain.training.loop import TrainingError, train
from pretrain.training.run_folder import RunFolder, RunFolderError
from pretrain.training.stop import StopRequest, stopping_at_once
from pretrain.training.weights import find_checkpoint, trained_precision

app = typer.Typer(
    name="byteloom",
    help="Pretrain models on raw bytes: files to shards, shards to a model, checkpoints that resume to the byte.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(corpus_commands.app)
app.add_typer(inspect_commands.app)
app.add_typer(run_commands.app)
app.add_typer(submit_command.app)
app.add_typer(sweep_command.app)
app.add_typer(model_commands.app, name="models")
app.add_typer(checkpoint_commands.app, name="checkpoint")
config_app = typer.Typer(help="Check, copy, show and explain recipes.", no_args_is_help=True)
app.add_typer(config_app, name="config")

FAULTS = (
    ClusterError,
    CorpusError,
    ConfigError,
    CheckpointError,
    EngineError,
    EvaluationError,
    FencedError,
    RunFolderError,
    SamplingError,
    SchedulerError,
    TrainingError,
    WorldError,
)
"""What a person can mend, and is told in a line."""

ModelPath = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="A run (its newest checkpoint is used), one checkpoint, or an export: folder or URL.",
        show_default=False,
        parser=types.location,
    ),
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


DeviceOption = Annotated[Device, typer.Option(help="Device to compute on. auto takes CUDA if there is a GPU.")]
PrecisionOption = Annotated[
    Precision | None,
    typer.Option(help="Precision to compute in. Default: that of the run, or fp32 if this machine emulates bf16."),
]
LatentsOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Number of latents of a Perceiver AR: more are more accurate and slower. Default: that of the run."
    ),
]


@app.command("train")
def train_command(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Train a run, or resume it from its newest checkpoint."""
    config = configuration.load(recipe, overrides or [])
    place, processes = place_of(os.environ), config.launch.processes
    if place is not None and processes not in (1, place.size):
        raise WorldError(
            f"launch.processes is {processes}, but another launcher has started {place.size} ranks already; "
            "set launch.processes=1"
        )
    is_first = place is None or place.rank == 0
    source = trace(configuration.find(recipe)) if is_first else {}
    if place is not None or processes == 1:
        raise typer.Exit(_train(config, source))
    with tempfile.TemporaryDirectory(prefix="byteloom-") as folder:
        resolved = Path(folder) / "recipe.yaml"
        save_resolved(resolved, config.as_yaml(), source)
        log_of = RunFolder(Path(config.run.root) / config.run.name).log_of
        raise typer.Exit(run_processes(TRAIN_ENTRY, resolved, processes, log_of))


def _show_versions(wanted: bool) -> None:
    if wanted:
        print_versions()
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_versions,
            is_eager=True,
            help="Print the versions of Byteloom, Python, torch, DeepSpeed and the accelerator.",
        ),
    ] = False,
) -> None:
    """Take the options that belong to no command."""


def start(recipe: Path) -> int:
    """The train entry that launchers call by name, once a rank; returns the exit code."""
    return run(lambda: _train(configuration.load(recipe), read_source(recipe)), FAULTS)


def _train(config: Config, source: Mapping[str, str]) -> int:
    place = place_of(os.environ)
    speak_as(place.rank if place else 0)
    crash.keep_in(Path(config.run.root) / config.run.name)
    stop = StopRequest(display.close, "stopped before the first step; there was nothing to save")
    with stop.listening():
        meeting = timedelta(seconds=config.launch.meeting_seconds)
        with display.phase("waiting for the other ranks"):
            world = World.join(choose_device(config.engine.device).type, meeting=meeting)
        try:
            with world.in_contact():
                return train(config, world, source, stop)
        finally:
            world.leave()


def _words(text: str | None) -> str | None:
    if text is not None and text != "count" and not (text.isdecimal() and int(text) > 0):
        raise typer.BadParameter(f"{text!r} is not a number of words and not the word count")
    return text


@app.command("eval")
@stopping_at_once(display.close)
def eval_command(
    model: ModelPath,
    shards: Annotated[
        str | None,
        typer.Argument(help="Corpus: folder or URL. Default: the validation corpus of the run.", parser=types.location),
    ] = None,
    mode: Annotated[
        Mode, typer.Option(help="What each byte is predicted from: by default only its own window.")
    ] = Mode.windows,
    by: Annotated[Grouping, typer.Option(help="How to group documents.")] = Grouping.folder,
    rows: Annotated[int, typer.Option(min=1, help="Number of windows scored at once.")] = 16,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of bytes scored at the end of each window: fewer have more context and take longer. "
            "Default: depends on the mode.",
        ),
    ] = None,
    latents: LatentsOption = None,
    device: DeviceOption = Device.auto,
    precision: PrecisionOption = None,
    words: Annotated[
        str | None,
        typer.Option(
            metavar="count|NUMBER",
            callback=_words,
            help="Show perplexity per word as well. Give the number of words in the corpus, or count to count words "
            "between white space.",
        ),
    ] = None,
    curves: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the bits per byte at each position in the window and the patch: CSV files and a picture.",
            parser=types.path,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the bits per byte of a checkpoint on a corpus, by group of documents."""
    loaded, checkpoint = _load_model(model, device, precision, latents)
    stride = stride or stride_of(loaded, mode)
    own = checkpoint.state["config"]["validation"]["shards"]
    if shards is None and own is None:
        raise CorpusError(f"{model} was trained without a validation corpus; name a corpus after it")
    chosen = shards or own
    remote = RemoteConfig.model_validate(checkpoint.state["config"]["data"]["remote"])
    with Corpus(chosen, remote=remote) as corpus:
        with display.phase("counting words"):
            counted = count_words(corpus, by.group_of) if words == "count" else {}
        with display.phase("scoring", corpus.raw_bytes) as phase:
            result = evaluate_model(loaded, corpus, mode, rows, by.group_of, phase.advance, stride)
    report = Report(
        model=str(checkpoint.folder),
        corpus=chosen,
        mode=mode,
        sequence_length=loaded.sequence_length,
        stride=stride,
        evaluation=result,
        patch_size=loaded.patch_size if isinstance(loaded, Megabyte) else None,
        words=sum(counted.values()) if words in (None, "count") else int(words),
        words_of_groups=counted,
    )
    if as_json:
        print_json(report.as_json())
    else:
        report.table().print()
    if curves is not None:
        report.write_curves(curves)
    _track_evaluation(model, checkpoint, report)


def _track_evaluation(model: str, checkpoint: Metadata, report: Report) -> None:
    """Store an evaluation of a tracked run, or of a checkpoint in its folder, in MLflow."""
    path = Path(model).resolve()
    run = RunFolder(path.parent.parent)
    if path.parent != run.checkpoints_in(None):
        run = RunFolder(path)
    if not run.mlflow.exists() or not checkpoint.state["config"]["tracking"]["enabled"]:
        return
    with tempfile.TemporaryDirectory(prefix="byteloom-") as folder:
        report.write_curves(Path(folder))
        (Path(folder) / "figures.json").write_text(json.dumps(report.as_json(), indent=1), encoding="utf-8")
        store_evaluation(run.mlflow, Path(folder), f"eval/{checkpoint.name}/{report.name}")


@app.command("generate")
@stopping_at_once(lambda: say(""))
def generate_command(
    model: ModelPath,
    prompt: Annotated[list[str] | None, typer.Option(help="Text that the model continues (repeatable).")] = None,
    prompt_file: Annotated[
        list[Path] | None,
        typer.Option(help="File whose bytes the model continues (repeatable).", parser=types.path),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Number of continuations of each prompt.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the continuations, one file each: PROMPT-SAMPLE.bin. Needed for more than one.",
            parser=types.path,
        ),
    ] = None,
    most_bytes: Annotated[
        int, typer.Option("--bytes", min=1, help="Largest number of bytes of each continuation.")
    ] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="Divides the logits. 0 takes the most likely byte.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw only from the k most likely bytes.")] = None,
    top_p: Annotated[
        float, typer.Option(help="Draw only from the most likely bytes whose probabilities add up to p.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the random draws.")] = 0,
    latents: LatentsOption = None,
    device: DeviceOption = Device.auto,
    precision: PrecisionOption = None,
) -> None:
    """Continue a prompt: write the bytes to standard output as they are drawn, or several continuations to a folder.

    A continuation ends early if the model ends the document.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    prompts = [text.encode("utf-8", "surrogateescape") for text in prompt or []]
    for path in prompt_file or []:
        try:
            prompts.append(path.read_bytes())
        except OSError as error:
            raise CorpusError(f"cannot read the prompt file {path}: {error.strerror}") from error
    prompts = [each for each in prompts or [b""] for _ in range(samples)]
    if out is None and len(prompts) > 1:
        raise SamplingError(f"{len(prompts)} continuations need a folder: add --out FOLDER")
    loaded, _ = _load_model(model, device, precision, latents)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    written = [bytearray() for _ in prompts]
    started = time.perf_counter()
    with contextlib.suppress(BrokenPipeError):  # whoever reads our output has had enough
        for row, byte in generate_rows(loaded, prompts, most_bytes, sampling):
            written[row].append(byte)
            if out is None:
                sys.stdout.buffer.write(bytes([byte]))
                sys.stdout.buffer.flush()
    seconds = time.perf_counter() - started
    if out is not None:
        for row, continuation in enumerate(written):
            (out / f"{row // samples:03d}-{row % samples:03d}.bin").write_bytes(continuation)
    total = sum(map(len, written))
    ended = sum(len(continuation) < most_bytes for continuation in written)
    ending = f"; the model ended {ended} of {count(len(written), 'document')}" if ended else ""
    say(f"\n{count(total, 'byte')}, {total / seconds:,.0f} bytes/s{ending}")


@app.command()
def track(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False, parser=types.path)],
    new_run: Annotated[
        bool, typer.Option("--new-run", help="Send everything to a new MLflow run, if the old one was deleted.")
    ] = False,
) -> None:
    """Send the metrics and files of a run that MLflow has not received yet."""
    folder = RunFolder(run)
    if not folder.mlflow.exists():
        raise RunFolderError(
            f"{run} has no mlflow.json: it is not a run folder, or the run was started with tracking.enabled=false"
        )
    with folder.locked():
        shipper = MlflowShipper(folder.metrics, folder.mlflow, folder.config, folder.log_of(0))
        if new_run:
            shipper.delivery.forget_run()
        missing = shipper.undelivered()
        if shipper.delivery.status == "RUNNING":  # whoever wrote that is dead: we hold the run's lock
            shipper.set_status("KILLED")
        try:
            shipper.finish()
        except MissingPackageError:
            raise
        except Exception as error:  # MLflow raises many kinds; the person asked for the delivery and is told
            raise RunFolderError(
                f"MLflow at {shown(shipper.delivery.uri)}: {fault_of(error)}. The numbers are safe in {folder.metrics}"
            ) from error
    say(f"{count(missing, 'step')} delivered to {shown(shipper.delivery.uri)}")


@config_app.command("show")
def config_show(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Print a recipe with its overrides and all defaults."""
    typer.echo(configuration.load(recipe, overrides or []).as_yaml(), nl=False)


@config_app.command("new")
def config_new(
    path: Annotated[
        Path, typer.Argument(help="File to write, such as my.yaml.", show_default=False, parser=types.path)
    ],
    recipe: Annotated[
        str,
        typer.Option(
            "--from",
            help="Recipe to copy: a name or a .yaml file.",
            autocompletion=complete_recipe,
            parser=types.location,
        ),
    ] = "debug",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
) -> None:
    """Write a commented copy of a recipe to edit, and a JSON schema for editors beside it."""
    schema = write_copy(recipe, path, force)
    say(f"{path} is a copy of the recipe {recipe}; {schema} describes its fields for editors")


@config_app.command("check")
def config_check(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    as_json: JsonOption = False,
) -> None:
    """Check a run without training: its recipe, data, checkpoint, memory, disk and packages.

    This writes nothing. The exit code is 1 if a start would fail.
    """
    findings = check_recipe(recipe, overrides or [])
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        print_findings(findings)
    raise typer.Exit(any(finding.level == "error" for finding in findings))


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    typer.echo(json.dumps(recipe_schema(), indent=1))


@config_app.command("explain")
def config_explain(
    field: Annotated[str, typer.Argument(help="Field such as model.patch_size, or section such as model.")],
) -> None:
    """Explain a field: its meaning, type, default and bounds."""
    print_lines(configuration.explain(field).splitlines())


def _load_model(
    path: str, device: Device, precision: Precision | None, latents: int | None
) -> tuple[ByteModel, Metadata]:
    """The model of a run's newest checkpoint, of one checkpoint or of an export, ready to score and generate."""
    with display.phase("verifying the checkpoint") as phase:
        checkpoint = find_checkpoint(path, progress=phase.update)
    config = checkpoint.state["config"]
    family = model_config(config["model"])
    if latents is not None:
        if not isinstance(family, PerceiverARConfig):
            raise CheckpointError(f"--latents {latents}: {path} is a {family.family} model, which has no latents")
        if latents > family.sequence_length:
            raise CheckpointError(f"--latents {latents} is more than the sequence length, {family.sequence_length}")
        family = family.model_copy(update={"latents": latents})
    model = build_model(family).eval()
    parameters = [whole(fragment_name(MODEL, name), parameter) for name, parameter in model.named_parameters()]
    with display.phase("loading the weights") as phase:
        read(checkpoint, parameters, phase.update)
    place = choose_device(device.value)
    chosen = precision.value if precision else scoring_precision(trained_precision(checkpoint), place)
    return model.to(place, compute_dtype(chosen)), checkpoint


def main() -> None:
    """Runs a command."""
    run(app, FAULTS)


if __name__ == "__main__":
    main()
