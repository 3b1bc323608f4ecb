"""Places where a supervisor starts ranks: the nodes of a Slurm job, or this machine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from launchers.supervision.causes import Fault
from launchers.supervision.plan import LaunchPlan


@dataclass(frozen=True)
class Ending:
    """End of the ranks of a start."""

    kind: str
    """finished, stopped (on request) or failed."""
    reason: str
    node: str = ""
    """Node on which the failure was seen first; empty if it is not known. Only a failure of class node blames it."""
    rank: int | None = None
    """Rank that failed or stopped first; None if it is not known."""
    fault: Fault = "code"
    """Class of a failure."""
    is_lost: bool = False
    """True if the scheduler has lost the node."""


@dataclass(frozen=True)
class Examination:
    """Result of a look at the nodes before a start."""

    problem: str = ""
    """Reason why no rank can run, on whatever nodes; empty if there is none."""
    faults: Mapping[str, str] = field(default_factory=dict)
    """Reason why a node must not be used, by node."""


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
    """Names of the nodes that train."""
    spares: Sequence[str]
    """Names of the nodes that wait to take the place of others."""
    has_others: bool
    """Whether the job can be given other nodes."""

    def seconds_left(self) -> float:
        """Return the seconds until the ranks would be asked to stop because of the job's time limit."""

    def examine(self) -> Examination:
        """Look at all nodes, with the spares.

        Raises:
            OSError: no node can use the run folder.
        """

    def leave(self, nodes: Sequence[str]) -> bool:
        """Use spares instead of some nodes from the next start on; return whether there are enough.

        If there are not, nothing changes.
        """

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
