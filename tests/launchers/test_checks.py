"""Checks of nodes before a start, and what is concluded from them."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launchers.checks.devices import faults_of_devices, product_faults
from launchers.checks.node import examine_node
from launchers.checks.report import (
    CheckRequest,
    NodeFault,
    NodeReport,
    faults_of_nodes,
    parse_reports,
    shared_fault,
)
from launchers.slurm.allocation import Allocation, examination_of
from launchers.slurm.guard import has_lost_its_host
from launchers.slurm.presets import ClusterConfig, ClusterError, load_cluster

BLIND = NodeFault("folder", "cannot see it")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a submission."""
    (tmp_path / "ranks").mkdir()
    return tmp_path


def faults(request: CheckRequest) -> list[str]:
    return [str(fault) for fault in examine_node(request, "n1").faults]


def test_check_without_gpus_imports_nothing_but_the_standard_library(folder: Path):
    code = (
        "import json, sys; from launchers.checks.node import *; r = CheckRequest(sys.argv[1], 1, lines=['true'])\n"
        "print(examine_node(r, 'n1').line()); print(json.dumps(sorted(m.partition('.')[0] for m in sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(folder)]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert parse_reports(done[0], BLIND)["n1"].faults == []
    assert not {"torch", "pydantic", "numpy", "yaml", "byteloom"} & set(json.loads(done[1]))
    assert list((folder / "ranks").iterdir()) == []


def test_folder_that_takes_no_files_is_a_fault_with_the_number_of_its_error(tmp_path: Path):
    [fault] = examine_node(CheckRequest(str(tmp_path / "gone"), 1), "n1").faults
    assert (fault.check, fault.number) == ("writable", errno.ENOENT)


def test_too_little_memory_is_a_fault_unless_it_is_not_checked(folder: Path):
    [fault] = faults(CheckRequest(str(folder), 1, memory=1 << 50))
    assert fault.startswith("check memory: ") and fault.endswith(f" and the job needs {int(0.8 * 2**30)} MiB")
    [fault] = faults(CheckRequest(str(folder), 1 << 30, unchecked=["memory"]))
    assert fault.startswith("check shm: ") and fault.endswith(f"free in /dev/shm, and the job needs {16 << 30} MiB")
    assert faults(CheckRequest(str(folder), 1 << 30, unchecked=["memory", "shm"])) == []


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["cd /", "test -d usr"], []),
        (["x=1", "test $x = 2", "true"], ["check lines: test $x = 2: exit code 1"]),
        (["echo no link >&2; exit 3"], ["check lines: no link"]),
        (["exit 3"], ["check lines: exit code 3"]),
        (["kill -9 $$"], ["check lines: exit code -9"]),
    ],
)
def test_lines_of_a_preset_are_one_script_that_stops_at_the_first_failure(
    folder: Path, lines: list[str], words: list[str]
):
    assert faults(CheckRequest(str(folder), 1, lines=lines)) == words


def test_lines_that_do_not_end_are_killed_with_what_they_started(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("launchers.checks.node.LINES_SECONDS", 0.2)
    assert faults(CheckRequest(str(folder), 1, lines=["sleep 60 & wait"])) == ["check lines: no end after 0 s"]


@pytest.mark.parametrize(
    ("ecc", "throttle", "code", "words"),
    [
        ("0, 0\n1, 0", "0, Not Active, Not Active\n1, Not Active, Not Active", 0, []),
        ("0, [N/A]", "0, [N/A], [N/A]", 0, []),
        ("0, 0\n1, 7", "0, Active, Not Active", 0,
         ["check ecc: GPU 1 has 7 uncorrected errors of its memory",
          "check throttle: GPU 0 is slowed down (hw_thermal_slowdown)"]),
        ('Field "x" is not a valid field to query.', 'Field "x" is not a valid field to query.', 2, []),
        ("Unable to determine the device handle for GPU1: GPU is lost", "", 15,
         ["check ecc: nvidia-smi: Unable to determine the device handle for GPU1: GPU is lost"]),
    ],
)  # fmt: skip
def test_driver_knows_errors_of_memory_and_throttled_gpus(
    folder: Path, monkeypatch: pytest.MonkeyPatch, ecc: str, throttle: str, code: int, words: list[str]
):
    """Print what nvidia-smi prints, because this machine has none."""
    (folder / "ecc").write_text(ecc + "\n")
    (folder / "throttle").write_text(throttle + "\n")
    command = folder / "nvidia-smi"
    command.write_text(
        f'#!/bin/sh\ncase "$*" in *ecc.errors*) cat {folder}/ecc ;; *) cat {folder}/throttle ;; esac\nexit {code}\n'
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    assert faults(CheckRequest(str(folder), 1, gpus=2, unchecked=["gpus", "product", "all-reduce"])) == words


def test_product_of_a_device_must_be_exact(monkeypatch: pytest.MonkeyPatch):
    cpu = torch.device("cpu")
    assert list(product_faults(cpu, 32)) == []
    right = torch.Tensor.to

    def flip(tensor: torch.Tensor, *arguments: object) -> torch.Tensor:
        moved = right(tensor, *arguments)
        if moved.shape[0] == 32:
            moved = moved.clone()
            moved[0, 0] += 2
        return moved

    monkeypatch.setattr(torch.Tensor, "to", flip)
    [fault, _] = product_faults(cpu, 32)
    assert fault.check == "product" and fault.words.endswith(" values of a product in torch.float32 are wrong")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
def test_missing_gpus_are_counted():
    [fault] = faults_of_devices(8, ["gpus", "product", "all-reduce"])
    assert str(fault) == "check gpus: torch sees 0 GPUs, and the job has asked for 8"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_healthy_gpus_have_no_fault():
    assert list(faults_of_devices(torch.cuda.device_count(), ["gpus", "product", "all-reduce"])) == []


NODES = ["n1", "n2", "n3"]


def reports(**clocks: float) -> dict[str, NodeReport]:
    return {node: NodeReport(node, clock) for node, clock in clocks.items()}


@pytest.mark.parametrize(
    ("clocks", "words"),
    [
        ({"n1": 1001.0, "n2": 1009.0, "n3": 1019.9}, {}),  # srun starts tasks one after another
        ({"n1": 1001.0, "n2": 1035.0, "n3": 1001.0}, {"n2": "25 s ahead of the clocks of the other nodes"}),
        ({"n1": 1001.0, "n2": 940.0, "n3": 1001.0}, {"n2": "60 s behind the clocks of the other nodes"}),
        # n1 asks, and its clock alone is wrong.
        ({"n1": 1001.0, "n2": 1110.0, "n3": 1110.0}, {"n1": "100 s behind the clocks of the other nodes"}),
        ({"n1": 1001.0, "n2": 1110.0}, {"n2": "100 s ahead of the clocks of the other nodes", "n3": "the node does not"
                                       " answer"}),
    ],
)  # fmt: skip
def test_clock_is_wrong_only_beyond_the_time_that_the_check_took(clocks: dict[str, float], words: dict[str, str]):
    found = faults_of_nodes(NODES, reports(**clocks), 1000.0, 1010.0)
    assert {node: fault.words for node, [fault] in found.items()} == words
    found = faults_of_nodes(list(clocks), reports(**clocks), 1000.0, 1010.0, check_clocks=False)
    assert found == {}


def test_reports_are_found_among_what_else_nodes_print():
    line = NodeReport("n2", 5.0, [NodeFault("memory", "too little", 0)]).line()
    printed = f"a module is loaded\n{line}\n" + 'byteloom-check {"node":"n3"}\n'
    found = parse_reports(printed, BLIND)
    assert found["n2"].faults == [NodeFault("memory", "too little")] and found["n3"].faults == [BLIND]


def test_fault_of_all_nodes_is_none_of_theirs():
    shm, memory = NodeFault("shm", "1 MiB"), NodeFault("memory", "2 MiB")
    assert shared_fault(NODES, {"n1": [shm], "n2": [memory, shm], "n3": [NodeFault("shm", "3 MiB")]}) == shm
    assert shared_fault(NODES, {"n1": [shm], "n2": [memory], "n3": [memory]}) is None
    assert shared_fault(NODES, {"n2": [BLIND], "n3": [BLIND]}) == BLIND  # the supervisor's node sees its own disk
    assert shared_fault(NODES, {"n3": [BLIND]}) is None
    assert shared_fault(["n1"], {}) is None


def test_conclusions_of_a_check():
    shm, full = NodeFault("shm", "1 MiB"), NodeFault("writable", "No space left", errno.ENOSPC)
    assert examination_of(NODES, {}).faults == {}
    assert examination_of(NODES, {"n2": [shm, BLIND]}).faults == {"n2": "check shm: 1 MiB; check folder: cannot see it"}
    assert examination_of(NODES, {"n2": [BLIND], "n3": [BLIND]}).problem == "n2, n3 cannot see it"
    assert examination_of(NODES, {node: [shm] for node in NODES}).problem == (
        "all nodes fail the same check, so it is not theirs; check shm: 1 MiB"
    )
    assert examination_of(["n1"], {"n1": [shm]}).faults == {"n1": "check shm: 1 MiB"}
    assert examination_of(NODES, {"n1": [full]}).faults == {"n1": "check writable: No space left"}
    with pytest.raises(OSError, match="no node can write to the run folder: No space left"):
        examination_of(["n1"], {"n1": [full]})


def allocation(folder: Path, hosts: str, **resources: object) -> Allocation:
    preset = ClusterConfig(**resources).model_dump_json()
    (folder / "cluster.yaml").write_text(preset)
    return Allocation(folder, {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": hosts})


@pytest.mark.parametrize("nodes", ["2", "2-4"])
def test_spares_take_the_places_of_faulty_nodes_until_there_are_none(folder: Path, nodes: str):
    site = allocation(folder, "n[1-4]", nodes=nodes, spares=2)
    assert (site.nodes, site.spares) == (["n1", "n2"], ["n3", "n4"])
    assert site.chosen(site.nodes) == ["--nodelist=n1,n2"]
    assert site.leave(["n9"]) and site.leave(["n3"])
    assert (site.nodes, site.spares) == (["n1", "n2"], ["n4"])
    assert site.leave(["n3", "n1"])
    assert (site.nodes, site.spares) == (["n2", "n4"], [])
    assert not site.leave(["n2"])
    assert site.nodes == ["n2", "n4"]


@pytest.mark.parametrize(
    ("shown", "is_lost"),
    [
        ("JobId=7 JobState=RUNNING NodeList=n[1,3] BatchHost=n1 NumNodes=2", False),
        ("JobId=7 JobState=RUNNING ReqNodeList=n1 NodeList=n[3-4] BatchHost=n1 NumNodes=2", True),
        ("JobId=7 JobState=PENDING NodeList=(null)", False),
        ("JobId=7 JobState=COMPLETING NodeList=n3 BatchHost=n1", False),
        ("", False),  # Slurm does not answer
    ],
)
def test_guard_requeues_a_running_job_that_has_lost_the_node_of_its_supervisor(shown: str, is_lost: bool):
    assert has_lost_its_host(shown) == is_lost


def test_all_nodes_of_a_job_need_no_list(folder: Path):
    site = allocation(folder, "n[1-2]", nodes="2")
    assert (site.nodes, site.spares, site.chosen(site.nodes)) == (["n1", "n2"], [], [])


def test_spares_are_added_to_the_nodes_that_a_job_asks_for(folder: Path):
    assert ClusterConfig(nodes="8", spares=1).allocated_nodes == "9"
    assert ClusterConfig(nodes="2-4", spares=1).allocated_nodes == "3-5"
    (folder / "mine.yaml").write_text("spares: 1\nunchecked: [trottle]\n")
    with pytest.raises(ClusterError, match=r"unchecked.*trottle"):
        load_cluster(str(folder / "mine.yaml"), {})
    (folder / "mine.yaml").write_text("scheduler: local\n")
    with pytest.raises(ClusterError, match="spares needs Slurm, but scheduler is local"):
        load_cluster(str(folder / "mine.yaml"), {"spares": 1})


@pytest.mark.parametrize(
    ("text", "size"), [(None, 0), ("0", 0), ("64G", 64 << 30), ("100", 100 << 20), ("2tb", 2 << 40)]
)
def test_memory_as_slurm_reads_it(text: str | None, size: int):
    assert ClusterConfig(memory=text).memory_bytes == size
