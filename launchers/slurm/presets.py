"""Presets of clusters: what a job asks of the scheduler, in a YAML file that `byteloom submit --cluster` names."""

import json
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError
from pydantic_core import ErrorDetails

from byteloom.core.configs import UnknownNameError, find_preset
from byteloom.core.errors import CorrectableError
from byteloom.core.validation import describe_expected, describe_value, nearest
from launchers.checks.report import CheckName
from launchers.slurm.times import seconds_of


class ClusterError(CorrectableError):
    """A preset or an option of a submission is wrong, or the cluster refuses it."""


class ClusterConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Resources of a job."""

    scheduler: Literal["slurm", "local"] = "slurm"
    """Scheduler of the job: Slurm, or this machine (submitit's local executor)."""
    nodes: str = Field(default="1", pattern=r"^[1-9]\d*(-[1-9]\d*)?$", examples=["4", "2-4"])
    """Number of nodes: 4, or 2-4 for as many as are free at the start. A restart may get another number."""
    spares: int = Field(default=0, ge=0)
    """Nodes that the job holds besides those that train. A spare takes the place of a faulty node without a wait in
    the queue."""
    processes_per_node: int | None = Field(default=None, ge=1)
    """Ranks on each node. Default: one for each GPU, or one."""
    gpus_per_node: str = Field(default="0", pattern=r"^([A-Za-z][\w.-]*:)?\d+$", examples=["8", "h100:8"])
    """GPUs of each node: a number, or a type and a number."""
    cpus_per_process: int = Field(default=1, ge=1)
    """CPU cores of each rank, for its own thread and those of its loader and its checkpoints."""
    memory: str | None = None
    """Memory of each node, such as 64G. Default: the partition's."""
    partition: str | None = None
    """Slurm's partition. Default: the cluster's."""
    account: str | None = None
    """Slurm account that is charged. Default: the cluster's."""
    qos: str | None = None
    """Quality of service. Default: the cluster's."""
    constraint: str | None = None
    """Features that nodes must have. Default: none."""
    time: str | None = Field(
        default=None, pattern=r"^(\d+|(\d+-)?\d+(:\d+){0,2})$", examples=["90", "12:00:00", "2-00:00:00"]
    )
    """Time limit of one start: minutes, hours:minutes:seconds or days-hours:minutes:seconds. A longer run resumes in
    another start."""
    signal_seconds: int = Field(default=180, ge=1, le=65535)
    """Seconds before the limit at which ranks are asked to stop. The longer of a step and a batch of validation windows
    must fit in, and then a checkpoint. Slurm may send the signal earlier."""
    setup: list[str] = []
    """Shell lines at the start of the job, such as module load cuda."""
    sbatch: dict[str, str | int | bool] = {}
    """More options of sbatch by their long names: {mail-type: END}."""
    srun: dict[str, str | int | bool] = {}
    """More options of the `srun` that starts the ranks, by their long names: {cpu-bind: cores}."""
    check: list[str] = []
    """Shell lines that each node runs before each start. A node where a line fails is excluded."""
    unchecked: list[CheckName] = []
    """Built-in checks of nodes that are not made, such as throttle."""
    prefix: list[str] = []
    """Words before the command of each rank: [apptainer, exec, --nv, image.sif]."""

    @property
    def gpus(self) -> int:
        """Return the number of GPUs of each node."""
        return int(self.gpus_per_node.rpartition(":")[2])

    @property
    def ranks_per_node(self) -> int:
        """Return the ranks on each node."""
        return self.processes_per_node or self.gpus or 1

    @property
    def least_nodes(self) -> int:
        """Return the smallest number of nodes."""
        return int(self.nodes.partition("-")[0])

    @property
    def allocated_nodes(self) -> str:
        """Return the number of nodes of the job, with its spares, in the form of `nodes`."""
        return "-".join(str(int(number) + self.spares) for number in self.nodes.split("-"))

    @property
    def memory_bytes(self) -> int:
        """Return the memory that the job asks for on each node, or 0 if it is not known."""
        found = re.fullmatch(r"(\d+)([KMGT]?)B?", self.memory or "", re.IGNORECASE)
        return int(found[1]) << {"K": 10, "M": 20, "G": 30, "T": 40}[found[2].upper() or "M"] if found else 0

    def as_submitit(self) -> dict[str, Any]:
        """Return submitit's parameters that do not depend on the command and the number of nodes."""
        return {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "mem": self.memory,
            "time": self.time,  # submitit's own default is five minutes; None is the partition's
            "signal_delay_s": self.signal_seconds,
            "stderr_to_stdout": True,
            "wckey": None,
        }


def load_cluster(name: str, changes: Mapping[str, Any]) -> ClusterConfig:
    """Return a preset, changed by options of the command.

    Args:
        name: of a preset that comes with Byteloom, or the path of a YAML file.
        changes: options by field; None is an option that was not set.

    Raises:
        ClusterError: there is none, or it is wrong.
    """
    try:
        path = find_preset(name)
        tree = yaml.load(path.read_text(encoding="utf-8"), _PresetLoader) or {}
    except UnknownNameError as error:
        raise ClusterError(f"--cluster {name}: {error}") from None
    except OSError as error:
        raise ClusterError(f"--cluster {name}: cannot read the preset: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ClusterError(f"{path} is not a preset: it is not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise ClusterError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ClusterError(f"{path} is not a preset: it must have fields with values, such as nodes: 1")
    given = {key: value for key, value in changes.items() if value is not None}
    for text in ("nodes", "time", "gpus_per_node"):
        if tree.get(text) is not None:
            tree[text] = str(tree[text])
    try:
        cluster = ClusterConfig.model_validate_json(json.dumps({**tree, **given}, default=str), strict=True)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        raise ClusterError("\n".join(dict.fromkeys(_describe(fault, given, path) for fault in faults))) from None
    if cluster.time and seconds_of(cluster.time) <= cluster.signal_seconds:
        raise ClusterError(
            f"signal_seconds of {path} is {cluster.signal_seconds}, but the job ends after "
            f"{seconds_of(cluster.time):.0f} s (time {cluster.time}), so it would stop as it starts; ask for more "
            "time, or set a smaller signal_seconds"
        )
    if cluster.scheduler == "local" and (unused := [name for name in ("spares", "check") if getattr(cluster, name)]):
        raise ClusterError(f"{path}: {unused[0]} needs Slurm, but scheduler is local")
    return cluster


def _describe(fault: ErrorDetails, given: Container[str], path: Path) -> str:
    """Return what is wrong, where it came from and what is expected.

    Args:
        fault: of pydantic.
        given: fields that are options of the command.
        path: of the preset.
    """
    name, *inside = map(str, fault["loc"])
    field = ".".join([name, *inside[:1]])
    origin = f"option --{field.replace('_', '-')}" if field in given else str(path)
    if fault["type"] == "extra_forbidden":
        return f"{origin}: {field} is not a field of a preset{nearest(field, list(ClusterConfig.model_fields))}"
    if name in ("sbatch", "srun") and inside:
        expected = "it must be text, a whole number, true or false"
    else:
        expected = describe_expected(fault, examples=ClusterConfig.model_fields[name].examples or ())
    return f"{origin}: {field} is {describe_value(fault['input'])}; {expected}"


class _PresetLoader(yaml.SafeLoader):
    """YAML loader that reads 12:00:00 as text, not as a number of seconds."""

    yaml_implicit_resolvers = {  # noqa: RUF012 a table of the class, as in the base class
        first: [(tag, pattern) for tag, pattern in known if not tag.endswith((":int", ":float", ":timestamp"))]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_PresetLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[0-9]+$"), list("0123456789"))


def refusal(said: str) -> ClusterError:
    """Return the error of a job that sbatch refused, with its reasons."""
    lines = [line.removeprefix("sbatch: error: ").removeprefix("allocation failure: ") for line in said.splitlines()]
    return ClusterError(f"Slurm refuses the job: {'; '.join(filter(None, lines))}")
