"""The `eval` command: bits per byte of a checkpoint on a corpus."""

import json
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.corpus.shards import Corpus
from data_pipeline.corpus.storage import RemoteConfig
from data_pipeline.errors import CorpusError
from pretrain.checkpoint import Metadata
from pretrain.cli.arguments import parse_location, parse_path
from pretrain.cli.weights import Device, DeviceOption, LatentsOption, ModelPath, PrecisionOption, load_model
from pretrain.evaluation.modes import Mode, evaluate_model, stride_of
from pretrain.evaluation.report import EvaluationReport
from pretrain.evaluation.words import count_words
from pretrain.models.families.megabyte import Megabyte
from pretrain.terminal.console import display
from pretrain.terminal.tables import JsonOption, print_json
from pretrain.tracking import store_evaluation
from pretrain.training.run_folder import RunFolder
from pretrain.training.stop import stopping_at_once

app = typer.Typer()


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
        typer.Argument(help="Corpus: folder or URL. Default: the validation corpus of the run.", parser=parse_location),
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
            parser=parse_path,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the bits per byte of a checkpoint on a corpus, by group of documents."""
    loaded, checkpoint = load_model(model, device, precision, latents)
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
    report = EvaluationReport(
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


def _track_evaluation(model: str, checkpoint: Metadata, report: EvaluationReport) -> None:
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
