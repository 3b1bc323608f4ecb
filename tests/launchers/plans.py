"""Plans of runs whose ranks need no model; see entry.py."""

from pathlib import Path

from launchers.slurm.presets import ClusterConfig
from launchers.supervision.plan import LaunchPlan, SuperviseConfig


def modelless_plan(run: Path, cluster: ClusterConfig, limits: SuperviseConfig) -> LaunchPlan:
    """Return the plan of a run whose recipe says what each rank does."""
    return LaunchPlan(
        entry="tests.launchers.entry:start",
        run=str(run),
        checkpoints=str(run / "checkpoints"),
        processes_per_node=cluster.ranks_per_node,
        cpus_per_process=1,
        gpus_per_node=cluster.gpus_per_node,
        supervise=limits,
        srun=cluster.srun,
        prefix=cluster.prefix,
    )
