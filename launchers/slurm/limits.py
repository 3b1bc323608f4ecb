"""Why a job would wait for ever: limits of the cluster that Slurm does not hold against a job when it takes it."""

import re
from collections.abc import Sequence

from launchers.slurm import scheduler
from launchers.slurm.calls import SchedulerError
from launchers.slurm.presets import ClusterConfig
from launchers.slurm.times import seconds_of

UNUSABLE = re.compile(r"down|drain|drng|fail|maint|unk|\*")
"""States of nodes on which no job starts, in sinfo's short or long words."""


def why_it_would_wait(cluster: ClusterConfig) -> list[str]:
    """Return reasons why a job would wait, a sentence each; empty if Slurm knows none, or does not answer.

    Args:
        cluster: resources of the job.
    """
    reasons = []
    for find in (_of_partition, _of_accounting):
        try:
            reasons += find(cluster)
        except SchedulerError:  # a cluster may keep no accounting; sbatch reports what hinders a submission
            continue
    return reasons


def _of_partition(cluster: ClusterConfig) -> list[str]:
    shown = scheduler.answer("scontrol", "--oneliner", "show", "partition", *filter(None, [cluster.partition]))
    partitions = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in shown.splitlines()]
    chosen = [each for each in partitions if cluster.partition or each.get("Default") == "YES"]
    if len(chosen) != 1:
        return []  # Slurm chooses one of several partitions
    [partition] = chosen
    name, reasons = partition["PartitionName"], []
    if partition.get("State", "UP") != "UP":
        reasons.append(f"partition {name} is {partition['State'].lower()}")
    if cluster.time and seconds_of(cluster.time) > seconds_of(partition["MaxTime"]):
        reasons.append(f"the time {cluster.time} is above the limit of partition {name}, {partition['MaxTime']}")
    for kind, value in (("Accounts", cluster.account), ("Qos", cluster.qos)):
        allowed = partition.get(f"Allow{kind}", "ALL")
        if value and allowed != "ALL" and value not in allowed.split(","):
            reasons.append(f"partition {name} takes jobs of {kind.lower()} {allowed} alone, not of {value}")
    states = scheduler.answer("sinfo", "--noheader", "--Node", f"--partition={name}", "--format=%T").split()
    usable = sum(not UNUSABLE.search(state) for state in states)
    needed = cluster.least_nodes + cluster.spares
    if usable < needed <= len(states):
        reasons.append(
            f"{usable} of the {len(states)} nodes of partition {name} can be used now, and the job needs "
            f"{needed}; the others are down or drained"
        )
    return reasons


def _of_accounting(cluster: ClusterConfig) -> list[str]:
    return [
        f"Slurm's accounting knows no {name} {value}"
        for name, column, value in (("account", "account", cluster.account), ("qos", "name", cluster.qos))
        if value and value not in _known(name, column)
    ]


def _known(entity: str, column: str) -> Sequence[str]:
    shown = scheduler.answer("sacctmgr", "--noheader", "--parsable2", "show", entity, f"format={column}")
    return shown.split("\n")
