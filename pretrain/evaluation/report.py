"""Reports of evaluations: a table, JSON, and curves by position as CSV files and a picture.

All of those about bits per byte name the mode, the stride, the context of first bytes and the options of the model's
use, because results that differ in one of them are not comparable.
"""

import csv
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from byteloom.core.packages import needed_by
from byteloom.core.storage.files import replace_file
from byteloom.core.text import count, printable
from pretrain.evaluation.beginning import Beginning
from pretrain.evaluation.modes import Mode
from pretrain.evaluation.scores import Evaluation, Score
from pretrain.objectives import ObjectiveConfig
from pretrain.terminal.losses import unit_of
from pretrain.terminal.tables import Table, figure

CURVE_POINTS = 128
"""Most points of a curve in the picture; neighbouring positions are merged."""


@dataclass(frozen=True)
class EvaluationReport:
    """An evaluation, and the way it was made."""

    model: str
    corpus: str
    mode: Mode
    sequence_length: int
    stride: int
    begin: Beginning
    """Context of the first byte of each document; never auto."""
    evaluation: Evaluation
    patch_size: int | None = None
    """Bytes of a patch. None: the model has no patches."""
    words: int = 0
    """Number of words of the corpus, for perplexity per word. 0: not requested, or there are none."""
    words_of_groups: Mapping[str, int] = field(default_factory=dict)
    """Number of words of each group, if they were counted."""
    usage: Mapping[str, Any] = field(default_factory=dict)
    """Values of all usage options of the model's family, by their names."""
    typed_usage: Mapping[str, Any] = field(default_factory=dict)
    """The usage options that differ from the run, as the user typed them."""

    @property
    def name(self) -> str:
        """Name of the folder of the figures, unique among evaluations of a checkpoint."""
        typed = [f"{name}-{value}" for name, value in self.typed_usage.items()]
        return "-".join([_corpus_name(self.corpus), self.mode, str(self.stride), self.begin, *typed])

    @property
    def title(self) -> str:
        """Sentence that names the model, the corpus, the mode, the stride, the beginning and the typed options."""
        place = "the separator before" if self.begin is Beginning.separator else "the start of"
        return (
            f"{self.model} on {self.corpus}, mode {self.mode}: windows of {count(self.sequence_length, 'byte')} from "
            f"{place} each document, the last {count(self.stride, 'byte')} of each are scored"
            + "".join(f", {name} {value}" for name, value in self.typed_usage.items())
        )

    @property
    def curves(self) -> dict[str, list[Score]]:
        """Scores by position in the window, and in the patch if the model has patches."""
        positions = self.evaluation.positions
        curves = {"window": positions.scores()}
        if self.patch_size is not None:
            curves["patch"] = positions.scores(self.patch_size)
        return curves

    def table(self) -> Table:
        """Return a table of the scores of each group of documents, and of all documents."""
        numbers = ["bits/byte", "bytes", "documents", *(["words", "perplexity"] if self.words else [])]
        table = Table(self.title, ["documents of", *numbers], numbers)
        for name, score in sorted(self.evaluation.groups.items()):
            table.add_row(name, *_cells(score), *_word_cells(score, self.words_of_groups.get(name, 0)))
        if self.evaluation.sample_bytes:
            table.add_rule()
            for name, score in self.evaluation.sample_bytes.items():
                table.add_row(f"sound, {name}", *_cells(score))
        table.add_rule()
        total = self.evaluation.total
        table.add_row("all", *_cells(total), *_word_cells(total, self.words))
        return table

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        found: dict[str, Any] = {
            "mode": self.mode.value,
            "sequence_length": self.sequence_length,
            "stride": self.stride,
            "begin": self.begin.value,
            "options": dict(self.usage),
            "total": _as_json(self.evaluation.total, self.words),
            "groups": {
                name: _as_json(score, self.words_of_groups.get(name, 0))
                for name, score in self.evaluation.groups.items()
            },
        }
        if self.evaluation.sample_bytes:
            found["sample_bytes"] = {name: _as_json(s) for name, s in self.evaluation.sample_bytes.items()}
        if self.patch_size is not None:
            found["patch_positions"] = [_as_json(score) for score in self.evaluation.positions.scores(self.patch_size)]
        return found

    def write(self, folder: Path, *, with_picture: bool = False) -> None:
        """Write figures.json, NAME-positions.csv for each curve, and positions.png of all if it is asked for."""
        self._write_tables(folder)
        if with_picture:
            self._draw(folder / "positions.png")
        replace_file(folder / "figures.json", json.dumps(self.as_json(), indent=1))

    def write_curves(self, folder: Path) -> None:
        """Write NAME-positions.csv for each curve, and positions.png of all."""
        self._write_tables(folder)
        self._draw(folder / "positions.png")

    def _write_tables(self, folder: Path) -> None:
        """Write NAME-positions.csv for each curve."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, scores in self.curves.items():
            with (folder / f"{name}-positions.csv").open("w", newline="", encoding="utf-8") as file:
                out = csv.writer(file)
                columns = ("mode", "sequence_length", "stride", "begin", "options")
                out.writerow([*columns, "position", "bytes", "nats", "bits_per_byte"])
                typed = " ".join(f"{name}={value}" for name, value in self.typed_usage.items())
                how = (self.mode.value, self.sequence_length, self.stride, self.begin.value, typed)
                out.writerows(
                    (*how, p, s.bytes, s.nats, s.bits_per_byte if s.bytes else "") for p, s in enumerate(scores)
                )

    def _draw(self, path: Path) -> None:
        with needed_by("--curves", "matplotlib"):
            from matplotlib.figure import Figure  # noqa: PLC0415 - takes a second

        curves = self.curves
        figure = Figure(figsize=(6 * len(curves), 4.5), layout="constrained")
        figure.suptitle(printable(self.title), fontsize=9, wrap=True)
        for axes, (name, scores) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
            places, heights = _points(scores)
            axes.plot(places, heights, marker="." if len(places) <= CURVE_POINTS // 2 else "")
            axes.axhline(self.evaluation.total.bits_per_byte, color="grey", linestyle=":", label="all bytes")
            axes.set(xlabel=f"position in the {name}", ylabel="bits per byte")
            axes.legend()
        figure.savefig(path, dpi=120)


@dataclass(frozen=True)
class LossReport:
    """The loss of an objective that is not causal."""

    model: str
    corpus: str
    objective: ObjectiveConfig
    sequence_length: int
    score: Score

    @property
    def name(self) -> str:
        """Name of the folder of the figures, unique among evaluations of a checkpoint."""
        return f"{_corpus_name(self.corpus)}-{self.objective.name}"

    def table(self) -> Table:
        """Return a table of the loss."""
        rows = f"rows of {count(self.sequence_length, 'id')}"
        title = f"{self.model} on {self.corpus}, objective {self.objective.name}: {rows}"
        accuracy = [] if self.accuracy is None else ["accuracy"]
        columns = [unit_of(self.objective.metric), *accuracy, f"{self.objective.entry.unit}s", "documents"]
        loss, *counts = _cells(self.score)
        table = Table(title, columns)
        table.add_row(loss, *([] if self.accuracy is None else [f"{self.accuracy:.2%}"]), *counts)
        return table

    @property
    def accuracy(self) -> float | None:
        """Return the share of the targets that are the likeliest bytes; None if they were not counted."""
        return None if self.score.likeliest is None else self.score.likeliest / self.score.bytes

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "objective": self.objective.model_dump(mode="json"),
            "sequence_length": self.sequence_length,
            self.objective.metric: self.score.bits_per_byte,
            "bytes": self.score.bytes,
            "nats": self.score.nats,
            "documents": self.score.documents,
            **({} if self.accuracy is None else {"accuracy": self.accuracy}),
        }

    def write(self, folder: Path, *, with_picture: bool = False) -> None:
        """Write figures.json. There are no curves by position, and no picture of them."""
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "figures.json", json.dumps(self.as_json(), indent=1))


def _corpus_name(corpus: str) -> str:
    """Return the last two parts of a location as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", "-".join(corpus.rstrip("/").split("/")[-2:]))


def _points(scores: list[Score]) -> tuple[list[float], list[float]]:
    """Return the points of a curve: mean positions and bits per byte of merged positions."""
    together = -(-len(scores) // CURVE_POINTS)
    places, heights = [], []
    for first in range(0, len(scores), together):
        sum_of = Score()
        for score in scores[first : first + together]:
            sum_of.add(score)
        if sum_of.bytes:
            places.append(first + (min(together, len(scores) - first) - 1) / 2)
            heights.append(sum_of.bits_per_byte)
    return places, heights


def _cells(score: Score) -> tuple[str, ...]:
    return f"{score.bits_per_byte:.4f}", f"{score.bytes:,}", f"{score.documents:,}" if score.documents else ""


def _word_cells(score: Score, words: int) -> tuple[str, ...]:
    return (f"{words:,}", f"{figure(score.word_perplexity(words))}") if words else ()


def _as_json(score: Score, words: int = 0) -> dict[str, Any]:
    found = {"bits_per_byte": score.bits_per_byte if score.bytes else None, "bytes": score.bytes, "nats": score.nats}
    if score.documents:
        found["documents"] = score.documents
    if words:
        found |= {"words": words, "word_perplexity": score.word_perplexity(words)}
    return found
