"""Reports of nodes about themselves, and what they say about a job's nodes.

node.py, on each node ─▶ one line of JSON ─▶ faults_of_nodes ─▶ shared_fault: nobody's node
                                                          └──▶ else each faulty node is excluded
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median_low
from typing import Literal

CheckName = Literal["writable", "clock", "memory", "shm", "gpus", "product", "all-reduce", "ecc", "throttle"]
"""Names of the built-in checks that a preset may leave out."""
DEVICE_CHECKS = ("gpus", "product", "all-reduce")
"""Checks that need torch."""
REPORT_MARK = "byteloom-check "
"""First characters of a report's line, among what else a node prints."""
CLOCK_SECONDS = 10.0
"""Largest difference between the clocks of two nodes."""


@dataclass(frozen=True)
class CheckRequest:
    """Checks that each node makes. They are passed as JSON on the command line."""

    folder: str
    """Folder of the submission, which the node must see and write."""
    ranks: int
    """Ranks of the node."""
    memory: int = 0
    """Memory that the job asks of the node, in bytes; 0 for the partition's."""
    gpus: int = 0
    lines: Sequence[str] = ()
    """Shell lines of the preset."""
    unchecked: Sequence[str] = ()
    """Names of built-in checks that are not made."""

    def includes(self, name: str) -> bool:
        """Return whether a built-in check is made."""
        return name not in self.unchecked


@dataclass(frozen=True)
class NodeFault:
    """One check that a node fails."""

    check: str
    words: str
    number: int = 0
    """The system's number of the error; 0 if it is none of the system."""

    def __str__(self) -> str:
        return f"check {self.check}: {self.words}"


@dataclass(frozen=True)
class NodeReport:
    """Report of one node."""

    node: str
    time: float
    """Seconds since 1970 by the node's clock."""
    faults: Sequence[NodeFault] = field(default_factory=tuple)

    def line(self) -> str:
        """Return the report as one line."""
        return REPORT_MARK + json.dumps(asdict(self))


def parse_reports(printed: str, blind: NodeFault) -> dict[str, NodeReport]:
    """Return the reports in the output of all nodes, by node.

    Args:
        printed: the output.
        blind: fault of a node that prints nothing but its name, because it cannot see the run folder.
    """
    reports = {}
    for line in printed.splitlines():
        _, is_report, text = line.partition(REPORT_MARK)
        if not is_report:
            continue
        tree = json.loads(text)
        faults = [NodeFault(**fault) for fault in tree["faults"]] if "faults" in tree else [blind]
        reports[tree["node"]] = NodeReport(tree["node"], tree.get("time", 0.0), faults)
    return reports


def faults_of_nodes(
    nodes: Sequence[str], reports: Mapping[str, NodeReport], began: float, ended: float, *, check_clocks: bool = True
) -> dict[str, list[NodeFault]]:
    """Return what each node fails, without nodes that are fine.

    Args:
        nodes: nodes that were asked.
        reports: their answers.
        began: time before they were asked, by the clock of the node that asks.
        ended: time after all have answered, by the same clock.
        check_clocks: whether a clock that differs is a fault.
    """
    times = {node: each.time for node, each in reports.items() if each.time and check_clocks}
    skews = _skews(times, began, ended)
    found = {}
    for node in nodes:
        if node not in reports:
            found[node] = [NodeFault("answer", "the node does not answer")]
            continue
        faults = list(reports[node].faults)
        if abs(skew := skews.get(node, 0.0)) > CLOCK_SECONDS:
            side = "ahead of" if skew > 0 else "behind"
            faults.append(NodeFault("clock", f"{abs(skew):.0f} s {side} the clocks of the other nodes"))
        if faults:
            found[node] = faults
    return found


def _skews(times: Mapping[str, float], began: float, ended: float) -> dict[str, float]:
    """Return by how much each clock is certainly wrong. If most are, the clock that asks is wrong, not they."""
    skews = {node: min(time - began, 0.0) + max(time - ended, 0.0) for node, time in times.items()}
    middle = median_low(skews.values()) if skews else 0.0
    most_differ = sum(abs(skew) > CLOCK_SECONDS for skew in skews.values()) * 2 > len(skews)
    return {node: skew - middle for node, skew in skews.items()} if most_differ else skews


def shared_fault(nodes: Sequence[str], faults: Mapping[str, Sequence[NodeFault]]) -> NodeFault | None:
    """Return a fault that all nodes have; None if there is none. It is not the nodes' fault.

    The first node runs the supervisor from the run folder, so a folder that no other node sees is not shared.
    """
    for name in dict.fromkeys(fault.check for each in faults.values() for fault in each):
        asked = nodes[1:] if name == "folder" else nodes
        having = {node: fault for node, each in faults.items() for fault in each if fault.check == name}
        if asked and all(node in having for node in asked):
            return having[asked[0]]
    return None
