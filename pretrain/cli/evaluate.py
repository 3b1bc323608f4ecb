"""The `eval` command: bits per byte of a checkpoint on a corpus."""

import json
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.storage import RemoteConfig
from data_pipeline.errors import CorpusError
from pretrain.checkpoint import Metadata
from pretrain.cli.arguments import MODELS_PANEL, parse_location, parse_path
from pretrain.cli.weights import Device, DeviceOption, LatentsOption, ModelPath, PrecisionOption, load_model
from pretrain.evaluation.modes import Mode, evaluate_model, stride_of
from pretrain.evaluation.report import EvaluationReport
from pretrain.evaluation.words import count_words
from pretrain.terminal.console import display
from pretrain.terminal.tables import JsonOption, print_json
from pretrain.tracking import store_evaluation
from pretrain.training.run_folder import RunFolder
from pretrain.training.stop import stopping_at_once

app = typer.Typer()


class Grouping(StrEnum):
    """How `eval` groups documents."""

    folder = "folder"
    suffix = "suffix"
    document = "document"
    none = "none"

    def group_of(self, key: str) -> str:
        """Return the group of a document, given its key."""
        return {
            "folder": key.rpartition("/")[0] or ".",
            "suffix": Path(key).suffix or "(none)",
            "document": key,
            "none": "all",
        }[self.value]


def _words(text: str | None) -> str | None:
    if text is not None and text != "count" and not (text.isdecimal() and int(text) > 0):
        raise typer.BadParameter(f"{text!r} is neither a number of words nor the word count")
    return text


@app.command("eval", rich_help_panel=MODELS_PANEL)
@stopping_at_once(display.close)
def eval_command(
    model: ModelPath,
    shards: Annotated[
        str | None,
        typer.Argument(
            metavar="CORPUS",
            help="Corpus: folder or URL. Default: the validation corpus of the run.",
            parser=parse_location,
        ),
    ] = None,
    mode: Annotated[Mode, typer.Option(help="Context of each byte; windows is its own window only.")] = Mode.windows,
    by: Annotated[Grouping, typer.Option(help="Grouping of documents.")] = Grouping.folder,
    rows: Annotated[int, typer.Option(min=1, help="Number of windows scored at once.")] = 16,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Bytes scored at the end of each window. Fewer bytes have more context and take longer. "
            "Default: by mode.",
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
            help="Also show perplexity per word. NUMBER is the words of the corpus; count counts them by white space.",
        ),
    ] = None,
    curves: Annotated[
        Path | None,
        typer.Option(
            help="Folder for bits per byte by position: CSV files and a picture.",
            parser=parse_path,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the bits per byte of a checkpoint on a corpus."""
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
        patch_size=loaded.patch_size,
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
    """Store an evaluation in MLflow if the model is a tracked run or one of its checkpoints."""
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
