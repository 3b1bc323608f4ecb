"""Everything that a report shows of one run, read from its folder."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from byteloom.core.errors import CorrectableError
from byteloom.core.provenance import flatten
from byteloom.core.storage.locations import locate
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.stream.inspection.coverage import Coverage
from pretrain.report.events import Event, events_of, parameters_of
from pretrain.report.numbers import NumberTable, tables_of
from pretrain.tracking.journal import read_journal
from pretrain.tracking.samples import SampleSet, read_samples, sample_folders
from pretrain.training.run_folder import RunFolder, as_started
from pretrain.training.run_status import RunStatus, status_of

T = TypeVar("T")

SAMPLED_STEPS = 20
"""Most steps of a run whose samples are shown: the newest."""
START_SECONDS = 1800.0
"""Longest time from the first event of a run to its first numbers."""


@dataclass(frozen=True)
class CorpusFacts:
    """Facts of a corpus that a run reads."""

    source: str
    """Name of the source, or of the validation corpus."""
    location: str
    documents: int | None = None
    """None: the corpus cannot be read from here. The same holds for the facts below."""
    raw_bytes: int | None = None
    stored_bytes: int | None = None
    modalities: str = ""
    coverage: str = ""
    """Sentence about the part of it that an epoch reads."""


@dataclass(frozen=True)
class StoredEvaluation:
    """An evaluation that `byteloom eval` stored in the run folder."""

    name: str
    """Checkpoint and name of the evaluation, with "/" between them."""
    figures: dict[str, Any]
    """Content of figures.json."""
    curves: dict[str, list[tuple[float, float]]]
    """(position, bits per byte) by the kind of position: window or patch."""


@dataclass(frozen=True)
class RunData:
    """Content of a report about one run."""

    name: str
    status: RunStatus
    began: float
    """Begin of the run, in seconds since 1970; 0 if nothing has happened yet."""
    tables: dict[str, NumberTable]
    events: list[Event]
    parameters: int | None
    config: dict[str, Any]
    """The resolved recipe of the last start."""
    config_text: str
    corpora: list[CorpusFacts]
    evaluations: list[StoredEvaluation]
    samples: list[tuple[Path, SampleSet]] = field(default_factory=list)
    """Newest samples of the run and the folder of each, newest first."""
    problems: list[str] = field(default_factory=list)
    """Files that are damaged or cannot be read, a line each."""

    @property
    def flat_config(self) -> dict[str, Any]:
        """Config fields by dotted name."""
        return flatten(self.config)


def read_run(path: Path) -> RunData:
    """Read a run folder. Damaged files are problems of the result.

    Raises:
        RunFolderError: the folder is not a run.
    """
    status, folder = status_of(path), RunFolder(path)
    problems = list(status.problems)

    def found(read: Callable[[], T], otherwise: T) -> T:
        try:
            return read()
        except (CorrectableError, OSError, ValueError) as error:
            if str(error) not in problems:
                problems.append(str(error))
            return otherwise

    records = found(lambda: read_journal(folder.metrics, lambda fault: None), list[dict[str, Any]]())
    text = found(lambda: folder.config.read_text(encoding="utf-8") if folder.config.exists() else "", "")
    config = found(lambda: yaml.safe_load(text) or {}, dict[str, Any]())
    coverage = found(folder.read_coverage, dict[str, Coverage]())
    events = found(lambda: events_of(folder), list[Event]())
    began = _began(records, events)
    return RunData(
        name=path.resolve().name,
        status=status,
        began=began,
        tables=tables_of(records, began),
        events=events,
        parameters=found(lambda: parameters_of(folder), None),
        config=config,
        config_text=text,
        corpora=[_facts(name, place, coverage) for name, place in _corpora(as_started(config, path)).items()],
        evaluations=found(lambda: _evaluations(folder.evaluations), list[StoredEvaluation]()),
        samples=found(lambda: _samples(folder.samples), list[tuple[Path, SampleSet]]()),
        problems=problems,
    )


def _began(records: Sequence[Mapping[str, Any]], events: Sequence[Event]) -> float:
    """Return when a run began: its first event, which comes before its first numbers.

    A log of another time zone seems much older or newer than the numbers, and does not count.
    """
    if not records:
        return events[0].time if events else 0.0
    first = float(records[0]["time"])
    return events[0].time if events and first - START_SECONDS < events[0].time < first else first


def _corpora(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the locations of the corpora that a recipe names, by source."""
    data, validation = config.get("data") or {}, config.get("validation") or {}
    found = {"corpus": data["shards"]} if data.get("shards") else {}
    found |= {name: source["shards"] for name, source in (data.get("mixture") or {}).items()}
    if validation.get("shards"):
        found["validation"] = validation["shards"]
    for name, each in (validation.get("corpora") or {}).items():
        found[f"validation {name}"] = each if isinstance(each, str) else each["shards"]
    return found


def _facts(source: str, location: str, coverage: Mapping[str, Coverage]) -> CorpusFacts:
    """Return the facts of a corpus; without sizes, if it is at a URL, which may not answer, or cannot be read."""
    covered = str(coverage[source]) if source in coverage else ""
    if isinstance(locate(location), Path):
        with suppress(CorrectableError, OSError), Corpus(location, check_shards=False) as corpus:
            return CorpusFacts(
                source,
                location,
                corpus.manifest["documents"],
                corpus.raw_bytes,
                sum(shard["bytes"] for shard in corpus.manifest["shards"]),
                ", ".join(corpus.modalities),
                covered,
            )
    return CorpusFacts(source, location, coverage=covered)


def _evaluations(folder: Path) -> list[StoredEvaluation]:
    found = []
    for figures in sorted(folder.glob("*/*/figures.json")):
        curves = {
            path.name.removesuffix("-positions.csv"): _curve(path) for path in figures.parent.glob("*-positions.csv")
        }
        name = "/".join(figures.parent.parts[-2:])
        found.append(StoredEvaluation(name, json.loads(figures.read_text(encoding="utf-8")), curves))
    return found


def _samples(folder: Path) -> list[tuple[Path, SampleSet]]:
    return [(path, read_samples(path)) for path in reversed(sample_folders(folder)[-SAMPLED_STEPS:])]


def _curve(path: Path) -> list[tuple[float, float]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        return [(float(row["position"]), float(row["bits_per_byte"])) for row in rows if row["bits_per_byte"]]
