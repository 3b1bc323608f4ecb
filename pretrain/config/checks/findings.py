"""Findings of a check, and what all checks of a recipe share."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import typer
from rich.console import Console

from byteloom.core.packages import MissingPackageError
from byteloom.core.storage.state_files import StateFileError
from byteloom.core.text import count, printable
from data_pipeline.errors import CorpusError
from data_pipeline.stream.config import ONLY_SOURCE
from pretrain.checkpoint import CheckpointError
from pretrain.config.schema import Config
from pretrain.engines import EngineError
from pretrain.terminal.console import say
from pretrain.terminal.tables import fold, terminal_width
from pretrain.training.run import TrainingError
from pretrain.training.run_folder import RunFolder, RunFolderError

REFUSALS = (
    CheckpointError,
    CorpusError,
    EngineError,
    MissingPackageError,
    RunFolderError,
    StateFileError,
    TrainingError,
    OSError,
)
"""Errors with which `byteloom train` refuses to start."""
ATTEMPTS = 3
"""Most requests to a remote corpus. A run makes data.remote.attempts of them."""
COLOURS = {"ok": None, "warning": "yellow", "error": "red"}

Level = Literal["ok", "warning", "error"]


class Finding(NamedTuple):
    """One result of a check."""

    level: Level
    field: str
    """Dotted name of the field; "" for the recipe as a whole."""
    text: str
    """A line for people that contains the field's name."""


def print_findings(findings: Sequence[Finding]) -> None:
    """Print a line for each finding to standard output, folded to the width of a terminal."""
    width = terminal_width(Console())
    for level, _, text in findings:
        typer.secho(f"{level:<9}", fg=COLOURS[level], nl=False)
        typer.echo(f"\n{' ' * 9}".join(fold(printable(text), None if width is None else max(width - 9, 20))))
    counts = Counter(finding.level for finding in findings)
    say(", ".join(count(counts[level], level) for level in ("error", "warning")))


class Check:
    """Config under check, and the findings so far."""

    def __init__(self, config: Config, opened: ExitStack) -> None:
        """Start without findings.

        Args:
            config: the config to check.
            opened: closes the corpora that checks open.
        """
        self.config = config
        remote = config.data.remote
        remote = remote.model_copy(update={"cache": None, "attempts": min(remote.attempts, ATTEMPTS)})
        self.data = config.data.model_copy(update={"remote": remote})
        """The data section, with few attempts and no cache."""
        self.opened = opened
        self.folder = RunFolder(Path(config.run.root) / config.run.name)
        self.home_is_known = False
        """Whether the run's checkpoints could be listed."""
        self.findings: list[Finding] = []

    def add(self, level: Level, field: str, text: str) -> None:
        """Add a finding; its text gets the field's name if it does not begin with it."""
        self.findings.append(Finding(level, field, text if text.startswith(field) else f"{field}: {text}"))

    @contextmanager
    def refusals(self, field: str) -> Iterator[None]:
        """Add an error of a field for an exception that would refuse a start."""
        try:
            yield
        except REFUSALS as error:
            self.add("error", field, str(error))

    def source_field(self, name: str) -> str:
        """Return the dotted name of the field that locates a source of the data."""
        return "data.shards" if name == ONLY_SOURCE and self.data.shards else f"data.mixture.{name}.shards"
