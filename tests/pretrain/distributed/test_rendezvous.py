"""Rank of a process, derived from the environment variables of launchers."""

import itertools

import pytest

from pretrain.distributed.rendezvous import Place, WorldError, place_of, slurm_port

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "node[003-005,9]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


def test_process_without_a_launcher_is_alone():
    assert place_of({}) is None


def test_batch_script_and_step_of_one_task_are_alone():
    assert place_of({"SLURM_JOB_ID": "1234", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) is None
    assert place_of(SRUN | {"SLURM_STEP_NUM_TASKS": "1"}) is None


def test_torchrun_variables_take_precedence_within_a_slurm_step():
    assert place_of(SRUN | TORCHRUN) == Place(3, 8, 1, "node1", 29500)


def test_ranks_under_srun_meet_at_the_first_host_and_a_port_of_the_step():
    assert place_of(SRUN) == Place(3, 8, 1, "node003", slurm_port(SRUN))
    assert place_of(SRUN | {"MASTER_ADDR": "other", "MASTER_PORT": "1"}) == Place(3, 8, 1, "other", 1)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("host", "host"),
        ("host,other[1-2]", "host"),
        ("node[003-005,9],login1", "node003"),
        ("gpu-a[1,3]-rack2", "gpu-a1-rack2"),
        ("rack[0-1]node[08-12]", "rack0node08"),
        ("a-b-7", "a-b-7"),
        ("a1,b[2-3]", "a1"),
        ("gpu-a[7]", "gpu-a7"),
    ],
)
def test_first_host_of_a_slurm_host_list(nodes: str, first: str):
    place = place_of(SRUN | {"SLURM_STEP_NODELIST": nodes})
    assert place is not None and place.address == first


def test_consecutive_slurm_steps_use_different_ports_below_the_ephemeral_range():
    ports = [
        slurm_port({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}) for job in range(9999) for step in range(7)
    ]
    assert all(one != two for one, two in itertools.pairwise(ports))
    assert min(ports) >= 20_000 and max(ports) < 32_768


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"WORLD_SIZE": "eight"}, "WORLD_SIZE is 'eight'"),
        ({"RANK": ""}, "RANK is ''"),
        ({"RANK": "8"}, "do not fit together: rank 8 of 8"),
        ({"MASTER_PORT": "123456"}, "do not fit together: rank 3 of 8 at node1:123456"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
    ],
)
def test_contradictory_environment_is_refused(change: dict[str, str], message: str):
    with pytest.raises(WorldError, match=message):
        place_of(TORCHRUN | change)


def test_missing_variables_are_named():
    with pytest.raises(WorldError, match="has WORLD_SIZE but not RANK, MASTER_PORT;"):
        place_of({name: value for name, value in TORCHRUN.items() if name not in ("RANK", "MASTER_PORT")})
    with pytest.raises(WorldError, match="SLURM_PROCID is ''"):
        place_of({name: value for name, value in SRUN.items() if name != "SLURM_PROCID"})
    with pytest.raises(WorldError, match="SLURM_STEP_NODELIST is ''"):
        place_of({name: value for name, value in SRUN.items() if name != "SLURM_STEP_NODELIST"})
