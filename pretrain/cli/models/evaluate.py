"""The `eval` command: bits per byte of a checkpoint on a corpus."""

import logging
import tempfile
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from byteloom.model import Model
from data_pipeline.errors import CorpusError
from pretrain.checkpoint import Metadata
from pretrain.cli.arguments import parse_location, parse_path
from pretrain.cli.models.weights import (
    BeginOption,
    DeviceOption,
    ModelPath,
    PrecisionOption,
    load_model,
    takes_usage_options,
)
from pretrain.evaluation.beginning import Beginning
from pretrain.evaluation.config import ValidationConfig, ValidationCorpus
from pretrain.evaluation.modes import Mode, check_usage, stride_of
from pretrain.evaluation.report import EvaluationReport, LossReport
from pretrain.evaluation.scores import EvaluationError
from pretrain.evaluation.words import count_words
from pretrain.models import usage_of
from pretrain.terminal.console import display
from pretrain.terminal.tables import JsonOption, print_json
from pretrain.tracking import store_evaluation
from pretrain.training.stop import stopping_at_once
from pretrain.training.weights.results import run_of

app = typer.Typer()
log = logging.getLogger(__name__)


class Grouping(StrEnum):
    """Grouping of documents in `eval`."""

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


@app.command("eval")
@stopping_at_once(display.close)
@takes_usage_options
def eval_command(
    model: ModelPath,
    shards: Annotated[
        str | None,
        typer.Argument(
            metavar="CORPUS",
            help="Corpus (folder or URL), or a file of any kind. Default: the validation corpus of the run.",
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
    begin: BeginOption = Beginning.auto,
    device: DeviceOption = "auto",
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
    *,
    usage: Mapping[str, Any],
) -> None:
    """Measure the bits per byte of a checkpoint on a corpus or a file.

    The file may hold text, sound, an image or any other bytes.
    A model of another objective than causal has another loss, such as bits per masked byte.
    """
    loaded = load_model(model, device, precision, usage, begin)
    if loaded.objective.entry.show is not None:
        if (mode, stride, words, curves) != (Mode.windows, None, None, None):
            raise EvaluationError(
                f"{model} was trained with objective.name {loaded.objective.name}, whose loss has no mode, stride, "
                "words and curves; leave these options out"
            )
        _show_loss(loaded, model, shards, rows, as_json=as_json)
        return
    check_usage(loaded.config, usage, mode)
    stride = stride or stride_of(loaded.module, mode)
    validation = loaded.checkpoint.state["config"]["validation"]
    named = ValidationCorpus(shards=shards) if shards else _validation_corpus(model, validation)
    with loaded.open_corpus(named.shards, named.shards_sha256) as corpus:
        with display.phase("counting words"):
            counted = count_words(corpus, by.group_of) if words == "count" else {}
        with display.phase("scoring", corpus.raw_bytes) as phase:
            result = loaded.evaluate(
                corpus, mode=mode, stride=stride, rows=rows, group_of=by.group_of, progress=phase.advance
            )
    report = EvaluationReport(
        model=str(loaded.checkpoint.folder),
        corpus=named.shards,
        mode=mode,
        sequence_length=loaded.sequence_length,
        stride=stride,
        begin=loaded.begin,
        evaluation=result,
        patch_size=loaded.module.patch_size,
        words=sum(counted.values()) if words in (None, "count") else int(words),
        words_of_groups=counted,
        usage=usage_of(loaded.config),
        typed_usage=usage,
    )
    if as_json:
        print_json(report.as_json())
    else:
        report.table().print()
    if curves is not None:
        report.write_curves(curves)
    _store_evaluation(model, loaded.checkpoint, report)


def _show_loss(loaded: Model, model: str, shards: str | None, rows: int, *, as_json: bool) -> None:
    """Print and store the loss of a model whose objective is not causal."""
    objective = loaded.objective
    named = (
        ValidationCorpus(shards=shards)
        if shards
        else _validation_corpus(model, loaded.checkpoint.state["config"]["validation"])
    )
    with (
        loaded.open_corpus(named.shards, named.shards_sha256) as corpus,
        display.phase("scoring", corpus.raw_bytes) as phase,
    ):
        score = loaded.loss(corpus, rows=rows, progress=phase.advance)
    if not score.bytes:
        raise EvaluationError(f"{named.shards} has no {objective.entry.unit} to score")
    report = LossReport(str(loaded.checkpoint.folder), named.shards, objective, loaded.sequence_length, score)
    if as_json:
        print_json(report.as_json())
    else:
        report.table().print()
    _store_evaluation(model, loaded.checkpoint, report)


def _validation_corpus(model: str, validation: Mapping[str, Any]) -> ValidationCorpus:
    """Return the only corpus of a recipe's section `validation`.

    Raises:
        CorpusError: it has none, or several.
    """
    known = {name: value for name, value in validation.items() if name in ValidationConfig.model_fields}
    corpora = list(ValidationConfig.model_validate(known).by_name().values())
    if not corpora:
        raise CorpusError(f"{model} was trained without a validation corpus; name a corpus after it")
    if len(corpora) > 1:
        places = ", ".join(named.shards for named in corpora)
        raise CorpusError(f"{model} has several validation corpora; name one after it: {places}")
    return corpora[0]


def _store_evaluation(model: str, checkpoint: Metadata, report: EvaluationReport | LossReport) -> None:
    """Store an evaluation in the run folder, and in MLflow, if the model is a run or one of its checkpoints."""
    run = run_of(model)
    if run is None:
        return
    place = run.evaluations / checkpoint.name / report.name
    try:
        report.write(place)
    except OSError as error:  # the run may be somebody else's
        log.warning("the evaluation was not stored in the run folder: %s", error)
    if not run.mlflow.exists() or not checkpoint.state["config"]["tracking"]["enabled"]:
        return
    with tempfile.TemporaryDirectory(prefix="byteloom-") as folder:
        report.write(Path(folder), with_picture=True)
        store_evaluation(run.mlflow, Path(folder), f"eval/{checkpoint.name}/{report.name}")
