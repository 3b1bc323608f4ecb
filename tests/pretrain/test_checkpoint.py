"""Checkpoints: whole or invisible, verified, and the same whatever ranges they were written in."""

import random
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.checkpoint import (
    CheckpointError,
    CheckpointStore,
    InvalidCheckpointError,
    read,
    verify,
)
from pretrain.checkpoint import (
    format as checkpoint_format,
)
from pretrain.fence import Fence, FencedError
from pretrain.fragments import Fragment, whole


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"model/a": (7, 5), "exp_avg/a": (7, 5), "model/b.weight": (13,), "model/scalar": ()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def fragments(of: dict[str, torch.Tensor]) -> list[Fragment]:
    return [whole(name, tensor) for name, tensor in of.items()]


def zeros() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=3)


def test_what_is_read_is_what_was_written(store: CheckpointStore):
    path = store.save(5, fragments(tensors()), {"position": {"step": 5}})
    target = zeros()
    metadata = verify(path)
    read(metadata, fragments(target))
    assert metadata.state == {"position": {"step": 5}}
    for name, tensor in tensors().items():
        assert torch.equal(target[name], tensor)


@given(
    cuts=st.lists(st.integers(0, 35), max_size=4),
    chunk=st.integers(1, 40),
    start=st.integers(0, 35),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_range_can_be_read_from_any_ranges(tmp_path_factory, cuts, chunk, start, data):
    folder = tmp_path_factory.mktemp("ranges")
    tensor = torch.arange(35.0).view(7, 5)
    edges = sorted({0, 35, *cuts})
    parts = [Fragment("model/a", (7, 5), a, tensor.view(-1)[a:b]) for a, b in pairwise(edges)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_format, "CHUNK_ELEMENTS", chunk)
        tensors_of = checkpoint_format.write_data(folder, 0, random.Random(0).sample(parts, len(parts)))
        checkpoint_format.write_metadata(folder, [tensors_of], {})
    length = data.draw(st.integers(0, 35 - start))
    target = torch.zeros(length)
    read(verify(folder), [Fragment("model/a", (7, 5), start, target)])
    assert torch.equal(target, torch.arange(start, start + length, dtype=torch.float32))


def test_a_tensor_with_a_gap_is_invalid(tmp_path: Path):
    tensor = torch.arange(35.0)
    written = checkpoint_format.write_data(tmp_path, 0, [Fragment("model/a", (35,), 0, tensor[:10])])
    checkpoint_format.write_metadata(tmp_path, [written], {})
    with pytest.raises(InvalidCheckpointError, match="does not hold all of tensor model/a"):
        verify(tmp_path)


def test_every_kind_of_damage_is_found_before_anything_is_loaded(store: CheckpointStore):
    good = store.save(1, fragments(tensors()), {"note": "x"})
    draw = random.Random(0)
    for round_number in range(150):
        copy = good.with_name("copy")
        shutil.copytree(good, copy)
        file = draw.choice(sorted(copy.iterdir()))
        content = bytearray(file.read_bytes())
        kind = draw.choice(["flip", "cut", "grow", "delete"])
        if kind == "flip":
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del content[draw.randrange(len(content)) :]
        elif kind == "grow":
            content += b"more"
        file.write_bytes(content)
        if kind == "delete":
            file.unlink()
        with pytest.raises(InvalidCheckpointError):
            verify(copy)
            raise AssertionError(f"round {round_number}: {kind} in {file.name} went unnoticed")
        shutil.rmtree(copy)


def test_an_invalid_checkpoint_is_set_aside_and_the_one_before_is_taken(store: CheckpointStore):
    for step in (1, 2, 3):
        store.save(step, fragments(tensors()), {"step": step})
    data = store.path(3) / "rank-00000.bin"
    data.write_bytes(data.read_bytes()[:-1])
    (store.path(2) / "metadata.json").unlink()
    assert store.newest_valid(set_aside=True).state == {"step": 1}
    assert sorted(p.name for p in store.folder.iterdir()) == [
        "step-00000001",
        "step-00000002.invalid",
        "step-00000003.invalid",
    ]
    store.save(3, fragments(tensors()), {"step": 3})
    assert store.newest_valid(set_aside=True).state == {"step": 3}


def test_what_a_killed_writer_left_is_not_a_checkpoint(store: CheckpointStore):
    store.save(1, fragments(tensors()), {})
    half = store.folder / "step-00000002.partial"
    half.mkdir()
    (half / "rank-00000.bin").write_bytes(b"half")
    assert store.newest_valid(set_aside=True).folder == store.path(1)
    store.save(2, fragments(tensors()), {})
    assert store.newest_valid(set_aside=True).folder == store.path(2)


def test_what_killed_processes_left_is_swept(store: CheckpointStore):
    """A kill while one checkpoint was written and another deleted."""
    for step in (1, 2, 3):
        store.save(step, fragments(tensors()), {})
    shutil.copytree(store.path(1), store.folder / "step-00000000.deleting")
    (store.folder / "step-00000000.deleting/metadata.json").unlink()
    shutil.copytree(store.path(1), store.folder / "step-00000137.partial")
    store.sweep()
    assert sorted(store.folder.iterdir()) == store.committed() == [store.path(step) for step in (1, 2, 3)]


def test_where_no_checkpoint_is_valid_the_run_is_not_begun_anew(store: CheckpointStore):
    store.save(1, fragments(tensors()), {})
    (store.path(1) / "rank-00000.bin").unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* is valid"):
            store.newest_valid(set_aside=True)


def test_the_newest_are_kept(store: CheckpointStore):
    for step in range(1, 6):
        store.save(step, fragments(tensors()), {})
    assert store.committed() == [store.path(step) for step in (3, 4, 5)]


def test_every_so_many_steps_one_is_kept_for_ever(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep=1, keep_every=3)
    for step in range(1, 8):
        store.save(step, fragments(tensors()), {})
    assert store.committed() == [store.path(step) for step in (3, 6, 7)]


def test_what_is_saved_is_what_was_there_when_the_save_began(store: CheckpointStore):
    live = tensors()
    for step in (1, 2):
        store.begin(step, fragments(live), {"step": step})
        for tensor in live.values():
            tensor.add_(1)
    store.finish()
    for step in (1, 2):
        target = zeros()
        read(verify(store.path(step)), fragments(target))
        for name, tensor in tensors().items():
            assert torch.equal(target[name], tensor + (step - 1))


def test_a_save_that_fails_behind_training_is_told_and_leaves_the_one_before(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
):
    store.save(1, fragments(tensors()), {})
    store.begin(2, fragments(tensors()), {"not JSON": object()})
    with pytest.raises(CheckpointError, match="no checkpoint could be written: Object of type object"):
        store.finish()
    assert "checkpoint of step 2: " in caplog.text
    store.finish()
    assert store.committed() == [store.path(1)] and not list(store.folder.glob("*.partial"))
    store.save(2, fragments(tensors()), {})
    assert store.newest_valid(set_aside=False).folder == store.path(2)


def test_only_the_newest_start_of_a_run_commits(tmp_path: Path):
    generation = tmp_path / "generation"

    def start() -> tuple[Fence, CheckpointStore]:
        fence = Fence(generation)
        fence.generation = fence.claim()
        return fence, CheckpointStore(tmp_path / "checkpoints", keep=3, fence=fence.check)

    old, old_store = start()
    old_store.save(1, fragments(tensors()), {})
    new, new_store = start()
    assert (old.holds, new.holds) == (False, True)
    with pytest.raises(FencedError, match="start 2 of this run has taken over from this one, start 1"):
        old.check()
    with pytest.raises(CheckpointError, match="has taken over"):
        old_store.save(2, fragments(tensors()), {})
    assert new_store.committed() == [new_store.path(1)]
    new_store.save(2, fragments(tensors()), {})


def test_another_model_is_refused_and_nothing_is_changed(store: CheckpointStore):
    metadata = verify(store.save(1, fragments(tensors()), {}))
    target = zeros()
    for wrong, message in (
        (Fragment("model/c", (2,), 0, torch.zeros(2)), "it has no tensor model/c"),
        (Fragment("model/a", (5, 7), 0, torch.zeros(35)), r"has shape \[7, 5\] there and \[5, 7\] here"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read(metadata, [*fragments(target), wrong])
    assert not any(tensor.any() for tensor in target.values())


def test_no_pickle_is_in_it(store: CheckpointStore):
    path = store.save(1, fragments(tensors()), {})
    assert sorted(p.name for p in path.iterdir()) == ["metadata.json", "rank-00000.bin"]
    assert (path / "rank-00000.bin").stat().st_size == 4 * (35 + 35 + 13 + 1)
