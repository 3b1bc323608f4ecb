"""Places where a supervisor starts ranks: the nodes of a Slurm job, or this machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from launchers.supervision.plan import LaunchPlan


@dataclass(frozen=True)
class Ending:
    """How the ranks of a start ended."""

    kind: str
    """finished, stopped (on request) or failed."""
    reason: str
    node: str = ""
    """Node on which the failure began; empty if it is not known."""
    rank: int | None = None
    """Rank that failed or stopped first; None if it is not known."""


class Ranks(Protocol):
    """The ranks of a start."""

    size: int
    """Number of ranks."""

    def ending(self) -> Ending | None:
        """Return how the ranks ended; None while they run."""

    def ask_where(self) -> None:
        """Send SIGQUIT to all ranks: each writes the stacks of its threads."""

    def kill(self) -> None:
        """Kill all ranks, on all nodes."""


class Site(Protocol):
    """A place where ranks can be started."""

    job: str
    """The scheduler's id of the job."""
    nodes: Sequence[str]
    """Names of the nodes."""
    has_others: bool
    """Whether the job can be given other nodes."""

    def why_unusable(self) -> str:
        """Return why no rank can run here; empty if ranks can run."""

    def start(self, plan: LaunchPlan, folder: Path, name: str) -> Ranks:
        """Start one rank for each processor.

        Args:
            plan: what to start.
            folder: folder of the submission.
            name: name of the start.
        """

    def is_owned(self) -> bool:
        """Return whether the nodes still belong to the job and nobody wants it to end. Wait until that is known."""

    def why_stopped(self) -> str:
        """Return who asked the ranks to stop, as far as it is known."""

    def lost(self, nodes: Sequence[str]) -> list[str]:
        """Return those of an earlier start's nodes that are out of order now."""

    def requeue(self, exclude: Sequence[str]) -> str:
        """Send the job back to the queue; return why that failed, or an empty string.

        After a success, the scheduler is about to end this process.

        Args:
            exclude: nodes that the job must not be given again.
        """
