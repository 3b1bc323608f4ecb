"""Slow ranks of a start: RUN/slow-ranks.json, which rank 0 writes while there are any.

    {"step": 100, "ranks": [{"rank": 37, "node": "n12", "factor": 1.3}]}

The supervisor records them in launches.jsonl, and `byteloom status` shows them. A start removes the file of an earlier
one.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from byteloom.core.storage.files import replace_file
from byteloom.core.storage.state_files import StateFileError, read_json


@dataclass(frozen=True)
class SlowRank:
    """A rank that computes for longer than the others in most steps of a window."""

    rank: int
    node: str
    factor: float
    """Compute time of its steps, relative to the median of the ranks with as much work; the median over a window."""


@dataclass(frozen=True)
class _StoredSlowRanks:
    """Content of slow-ranks.json."""

    step: int
    """Last step of the window in which they were slow."""
    ranks: list[SlowRank]


def slow_ranks_file(run: Path) -> Path:
    """Return the file of a run's slow ranks."""
    return run / "slow-ranks.json"


def write_slow_ranks(run: Path, step: int, ranks: Sequence[SlowRank]) -> None:
    """Write the slow ranks of a window of steps, or remove the file if there are none.

    Storage that fails is no reason to end a run: the next window writes the file again.
    """
    with suppress(OSError):
        if ranks:
            text = json.dumps(asdict(_StoredSlowRanks(step, list(ranks))))
            replace_file(slow_ranks_file(run), text, durable=False)
        else:
            slow_ranks_file(run).unlink(missing_ok=True)


def read_slow_ranks(run: Path) -> list[SlowRank]:
    """Return the slow ranks of a run; an empty list if there are none, or if the file is damaged."""
    with suppress(StateFileError):  # the next window writes it again
        stored = read_json(slow_ranks_file(run), _StoredSlowRanks, "the run writes it again")
        return [] if stored is None else stored.ranks
    return []


def describe_slow_ranks(ranks: Sequence[SlowRank]) -> dict[str, str]:
    """Return a clause about the slow ranks of each node: "rank 37 on n12 is 30 % slower than the median"."""
    by_node: dict[str, list[SlowRank]] = {}
    for each in ranks:
        by_node.setdefault(each.node, []).append(each)
    return {node: _clause(node, of_node) for node, of_node in by_node.items()}


def _clause(node: str, ranks: Sequence[SlowRank]) -> str:
    percent = round(100 * (max(each.factor for each in ranks) - 1))
    if len(ranks) == 1:
        return f"rank {ranks[0].rank} on {node} is {percent} % slower than the median"
    numbers = ", ".join(str(each.rank) for each in ranks)
    return f"ranks {numbers} on {node} are up to {percent} % slower than the median"
