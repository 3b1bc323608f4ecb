"""Entries of the catalogue, as their files state them and as they are checked."""

import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, StringConstraints, ValidationError, model_validator

FOLDER = Path(__file__).parent / "models"
"""Folder of the catalogue's files."""
UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
"""Factors of the letters behind numbers of parameters."""

Size = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)?[KMBT]$")]
"""Number of parameters as a source prints it: 1.5B."""
Month = Annotated[str, StringConstraints(pattern=r"^20\d\d-(0[1-9]|1[0-2])$")]
"""Month of the first version: 2019-04."""
Text = Annotated[str, StringConstraints(min_length=1, max_length=200, strip_whitespace=True)]
Architecture = Literal["encoder", "decoder", "encoder-decoder", "either"]
"""Parts of the Transformer that are pretrained. either: the paper has models of several kinds."""
Task = Literal[
    "causal",
    "masked",
    "permuted",
    "replaced",
    "denoising",
    "contrastive",
    "classification",
    "translation",
    "distillation",
    "instructions",
    "human feedback",
    "diffusion",
    "actions",
    "structure",
]
"""Task of the training that the paper adds."""
Unit = Literal["bits per byte", "perplexity per word", "accuracy", "score", "F1", "BLEU", "ROUGE-1", "FID"]
"""Unit of a result. Accuracy, score, F1, BLEU and ROUGE are in percent."""


class CatalogueError(Exception):
    """A file of the catalogue is wrong; the message names the file, the entry and the field."""


class Result(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """A result that a paper prints."""

    data: Text
    """Data set or benchmark."""
    value: float
    """Number as printed."""
    unit: Unit
    """Unit of the number."""
    mode: Text
    """Way of the measurement."""
    split: Literal["train", "validation", "test", "not stated"]
    """Part of the data."""


class Entry(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """A model, or the models of one paper."""

    name: Text
    """Name; unique."""
    title: Text
    """Title of the paper, or of the page."""
    arxiv: Annotated[str, StringConstraints(pattern=r"^\d{4}\.\d{4,5}$")] | None = None
    """Number on arXiv. None: `url` names the source."""
    url: Annotated[str, StringConstraints(pattern=r"^https://\S+$")] | None = None
    """Address of a source that is not on arXiv."""
    date: Month
    """Month of the paper's first version on arXiv, or of the page or release that `url` names."""
    lab: Text
    """Organization of the authors."""
    family: Text
    """Model whose architecture this one has."""
    architecture: Architecture
    """Parts of the Transformer that are pretrained."""
    task: Task
    """Task of the training that the paper adds."""
    extends: tuple[Text, ...]
    """Names of the entries that this one builds on, the closest first."""
    extension: Text
    """Changes to these entries."""
    application: Text
    """Purpose of the model."""
    corpus: Text
    """Training data."""
    parameters: tuple[Size, ...]
    """Sizes that the paper, its authors' code or the model card prints, smallest first; empty if none."""
    results: tuple[Result, ...] = ()
    """Some results of the paper."""
    recipes: tuple[Text, ...] = ()
    """Recipes of Byteloom with this architecture, trained on bytes; empty if Byteloom has none."""

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.arxiv is None) == (self.url is None):
            raise ValueError("an entry has either arxiv or url")
        sizes = [parameters_of(size) for size in self.parameters]
        if sizes != sorted(sizes):
            raise ValueError(f"parameters are not in rising order: {', '.join(self.parameters)}")
        return self

    @property
    def source(self) -> str:
        """Address of the paper or page."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else str(self.url)

    @property
    def sizes(self) -> str:
        """Smallest and largest size, or a dash."""
        if len(self.parameters) < 2:
            return self.parameters[0] if self.parameters else "-"
        return f"{self.parameters[0]}-{self.parameters[-1]}"


class Grouping(StrEnum):
    """Ways to group the catalogue."""

    family = "family"
    date = "date"
    task = "task"
    architecture = "architecture"

    def group_of(self, entry: Entry) -> str:
        """Return the group of an entry: a year, or the value of a field."""
        value: str = getattr(entry, self.value)
        return value[:4] if self is Grouping.date else value


def parameters_of(size: str) -> float:
    """Return the number that a size stands for."""
    return float(size[:-1]) * UNITS[size[-1]]


@cache
def read_catalogue(folder: Path = FOLDER) -> Mapping[str, Entry]:
    """Return the entries of all files by name, oldest first.

    Raises:
        CatalogueError: a file is wrong, a name occurs twice, or an entry extends what is not in the catalogue or is
            younger.
    """
    entries: dict[str, Entry] = {}
    for path in sorted(folder.glob("*.yaml")):
        for tree in yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader):
            entry = _entry(path, tree)
            if entry.name in entries:
                raise CatalogueError(f"{path}: {entry.name} is in the catalogue already")
            entries[entry.name] = entry
    for entry in entries.values():
        for name in entry.extends:
            if name not in entries:
                raise CatalogueError(f"{entry.name} extends {name}, which is not in the catalogue")
            if entries[name].date > entry.date:
                raise CatalogueError(f"{entry.name} ({entry.date}) extends {name}, which is younger")
    return dict(sorted(entries.items(), key=lambda item: (item[1].date, item[0].lower())))


def _entry(path: Path, tree: Any) -> Entry:
    try:
        return Entry.model_validate(tree)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        name = tree.get("name", "an entry") if isinstance(tree, dict) else "an entry"
        field = ".".join(map(str, fault["loc"]))
        raise CatalogueError(f"{path}: {name}: {field}: {fault['msg']}".replace(": :", ":")) from error


def grouped(entries: Sequence[Entry], by: Grouping) -> dict[str, list[Entry]]:
    """Return entries by group, in the order of the names of the groups."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(by.group_of(entry), []).append(entry)
    return dict(sorted(groups.items(), key=lambda item: re.sub(r"\W", "", item[0].lower())))
