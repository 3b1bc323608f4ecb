"""Models whose patches follow the data on a real cluster: a run moves between nodes, engines and numbers of ranks.

    fsdp, 2 ranks ─ preempted ─▶ fsdp, 2 ranks ─ node lost ─▶ fsdp, 2 ranks ─ cancelled
        ─▶ zero3, 2 ranks ─▶ ddp, 3 ranks ─▶ one process

The first phase has no end, so that the machine's speed does not matter. The learning rate is small: where patches start
is discrete, and the rounding of another engine would otherwise grow over many steps.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pretrain.checkpoint import CheckpointStore, read_metadata
from pretrain.models import build_model, small_config
from pretrain.training.weights.exports import write_export
from tests.conftest import recipe_tree, two_stages
from tests.slurm.cluster import Cluster, running_cluster, wait_until
from tests.slurm.submitted import SubmittedRun, byteloom, steps_of

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]

LENGTH = 128
MODELS: dict[str, dict[str, Any]] = {
    "two-stages": two_stages(LENGTH),
    "entropy": small_config("blt").model_dump(mode="json")
    | {"sequence_length": LENGTH, "patches": 40, "window": 16}
    | {"patcher": {"name": "entropy", "model": "small", "threshold": 5.0}},
}
TWO_NODES = ("--nodes=2", "--processes-per-node=1", "--cpus-per-process=1", "--partition=low", "--time=120")
STAGES = {"two-stages": 2, "entropy": 1}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Run a cluster that gives preempted jobs as much time as a loaded machine may need."""
    with running_cluster(tmp_path_factory.mktemp("cluster"), grace=120) as cluster:
        yield cluster


def write_files(folder: Path, corpus_folder: Path, name: str) -> Path:
    """Write the recipe of a model, and the export `small` beside it, which the recipe names by a relative path."""
    torch.manual_seed(5)
    config = small_config("transformer", window=4, sequence_length=LENGTH)
    weights = {key: torch.randn(each.shape) * 0.3 for key, each in build_model(config).named_parameters()}
    write_export(folder / "small", weights, {"model": config.model_dump(mode="json")}, {})
    tree: dict[str, Any] = recipe_tree(corpus_folder)
    tree["model"] = MODELS[name]
    tree["train"] = {"steps": 1_000_000, "global_batch": 12, "micro_batch": 4}
    tree["optimizer"] = {"learning_rate": 3e-5, "schedule": {"shape": "constant", "warmup_steps": 0}}
    tree["checkpoint"] = {"every": 2}
    tree["validation"] = {"shards": None}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", MODELS)
def test_run_moves_between_nodes_engines_and_ranks(cluster: Cluster, corpus_folder: Path, tmp_path: Path, name: str):
    recipe = write_files(tmp_path, corpus_folder, name)
    run = SubmittedRun(cluster, recipe, name, "engine.name=fsdp", *TWO_NODES)
    run.wait_for_step(2)
    cluster.run("sbatch", "-p", "high", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2")
    assert run.wait_for("stopped").reason.endswith(": preempted")
    started = run.wait_for("started", 2)
    run.wait_for_step(run.last_step() + 2)
    cluster.crash(started.nodes[1])
    run.wait_for("started", 3)
    cluster.start_node(started.nodes[1])
    run.wait_for_step(run.last_step() + 2)
    byteloom(cluster, tmp_path, "cancel", run.folder)
    wait_until(lambda: cluster.job(run.job)["JobState"] == "CANCELLED", "cancelled", 240)
    steps = run.last_step() + 3
    (tmp_path / "small").rename(tmp_path / "elsewhere")  # from here on, the run takes its copy
    for number, (engine, nodes) in enumerate((("zero3", 2), ("ddp", 3)), 1):
        words = (f"engine.name={engine}", f"train.steps={steps}", f"--nodes={nodes}")
        run.job = run.submit(f"runs/{name}", *words)
        assert len(run.wait_for("started", 3 + number).nodes) == nodes
        run.wait_for("finished", number)
        steps += 3
    same = f"train.steps={steps}"
    byteloom(cluster, tmp_path, "train", f"runs/{name}/config.yaml", "engine.name=ddp", same)
    moved_model = ["model.patcher.model=elsewhere"] if name == "entropy" else []
    byteloom(cluster, tmp_path, "train", "recipe.yaml", "run.name=alone", same, *moved_model)

    moved, alone = steps_of(run.folder), steps_of(tmp_path / "runs/alone")
    assert [line["step"] for line in moved] == [line["step"] for line in alone] == list(range(1, steps + 1))
    for metric in ("train/bits_per_byte", *(f"patches/{stage}/bytes_per_patch" for stage in range(STAGES[name]))):
        assert [line[metric] for line in moved] == pytest.approx([line[metric] for line in alone], rel=1e-3), metric
    states = [
        read_metadata(CheckpointStore(folder / "checkpoints", keep=1).committed()[-1]).state
        for folder in (run.folder, tmp_path / "runs/alone")
    ]
    assert states[0]["reading"] == states[1]["reading"]  # the digest of what was read, and the place in the data
    assert states[0]["counters"] == states[1]["counters"] == {"optimizer_steps": steps}
