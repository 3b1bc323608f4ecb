"""Ranks that load together read each byte of a checkpoint once, and get any ranges that they ask for."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint import CheckpointError, CheckpointStore, loading, read, read_metadata, staging
from pretrain.checkpoint import data as checkpoint_data
from pretrain.checkpoint import format as checkpoint_format
from pretrain.distributed.fragments import Fragment, whole
from pretrain.distributed.world import ALONE, World
from tests.distributed.ranks import on_ranks

RANKS = 3
SHAPES = {"model/a": (7, 50), "exp_avg/a": (7, 50), "model/b": (101,), "model/empty": (0,), "model/scalar": ()}
CASES = 40
BLOCK, CHUNK = 64, 256
"""Bytes of blocks and of chunks of staging, so that a small checkpoint has many of both."""


def tensors(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def random_parts(draw: random.Random, ranks: int) -> list[list[Fragment]]:
    """Return ranges of zeros for each rank: rows, replicas, or ranges of any length that may overlap."""
    kind = draw.choice(["rows", "replicas", "any"])
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    parts = []
    for rank in range(ranks):
        if kind == "rows":
            parts.append([whole(name, zeros[name].clone()).share(rank, ranks) for name in SHAPES])
        elif kind == "replicas":
            parts.append([whole(name, zeros[name].clone()) for name in SHAPES])
        else:
            names = draw.sample(list(SHAPES), draw.randrange(len(SHAPES)))
            ends = {name: sorted(draw.choices(range(zeros[name].numel() + 1), k=2)) for name in names}
            parts.append([whole(name, zeros[name].clone()).part(*ends[name]) for name in names])
    return parts


def load_random_parts(world: World, folder: Path) -> list[dict[str, Any]]:
    """Save and load in many random ways; return what each load read, and whether its fragments are right."""
    draw = random.Random(0)  # the same choices on all ranks
    results = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (checkpoint_data, checkpoint_format):
            patch.setattr(module, "BLOCK_BYTES", BLOCK)
        patch.setattr(checkpoint_data, "WINDOW_BYTES", 2 * BLOCK)
        for module in (checkpoint_data, loading, staging):
            patch.setattr(module, "CHUNK_BYTES", CHUNK)
        store = CheckpointStore(folder, keep=1, world=world)
        for case in range(1, CASES):
            live = tensors(case)
            store.save(case, [whole(name, live[name]).share(world.rank, world.size) for name in SHAPES], {})
            own = random_parts(draw, world.size)[world.rank]
            expected = [live[part.name].view(-1)[part.start : part.start + len(part.data)] for part in own]
            progress = [(0, 0)]

            def note(done: int, total: int, progress: list[tuple[int, int]] = progress) -> None:
                progress.append((done, total))

            metadata = store.load(lambda checkpoint, own=own: own, progress=note)
            again = [Fragment(part.name, part.shape, part.start, torch.zeros_like(part.data)) for part in own]
            read(metadata, again, world=world)
            results.append({
                "read": progress[-1][0],
                "bytes": sum(file.bytes for file in metadata.files),
                "same": all(torch.equal(part.data, values) for part, values in zip(own, expected, strict=True)),
                "again": all(torch.equal(part.data, values) for part, values in zip(again, expected, strict=True)),
            })  # fmt: skip
    return results


def find_damage(world: World, folder: Path) -> tuple[str, bool]:
    """Read a checkpoint, one block of which is damaged, which only one rank reads."""
    store = CheckpointStore(folder, keep=1, world=world)
    live = torch.arange(3 * 2**18 + 5.0)
    store.save(1, [whole("model/a", live).share(world.rank, world.size)], {})

    def damage() -> None:
        path = store.path(1) / "rank-00001.bin"
        content = bytearray(path.read_bytes())
        content[100] ^= 1
        path.write_bytes(content)

    world.on_first(damage)
    target = torch.zeros_like(live)
    try:
        read(read_metadata(store.path(1)), [whole("model/a", target)], world=world)
    except CheckpointError as error:
        return str(error), bool(target.any())
    return "", True


@pytest.fixture(scope="module")
def results_by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    return on_ranks(RANKS, load_random_parts, tmp_path_factory.mktemp("random"))


def test_every_rank_gets_the_values_that_it_asked_for(results_by_rank: list[list[dict[str, Any]]]):
    assert all(result["same"] and result["again"] for results in results_by_rank for result in results)


def test_ranks_together_read_each_byte_once_and_about_equally_many(results_by_rank: list[list[dict[str, Any]]]):
    for of_ranks in zip(*results_by_rank, strict=True):
        everything = of_ranks[0]["bytes"]
        assert sum(result["read"] for result in of_ranks) == everything
        assert max(result["read"] for result in of_ranks) <= everything // RANKS + BLOCK


def test_damage_that_one_rank_reads_is_a_fault_of_all_before_any_tensor_changes(tmp_path: Path):
    for fault, has_changed in on_ranks(RANKS, find_damage, tmp_path):
        assert "rank-00001.bin is damaged between bytes 0 and" in fault
        assert not has_changed


def test_one_process_gets_the_values_that_it_asked_for(tmp_path: Path):
    for result in load_random_parts(ALONE, tmp_path):
        assert result["same"] and result["again"]
        assert result["read"] <= result["bytes"]
