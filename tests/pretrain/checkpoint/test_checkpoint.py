"""Checkpoints: atomic, verified, and independent of the ranges in which they were written."""

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
    Metadata,
    read,
    read_metadata,
    verify,
)
from pretrain.checkpoint import data as checkpoint_data
from pretrain.checkpoint import format as checkpoint_format
from pretrain.checkpoint.data import bytes_of, write_file
from pretrain.checkpoint.format import LAYOUT, StoredFile, encode_layout, encode_metadata, owned_ranges
from pretrain.checkpoint.homes.fence import Fence, FencedError
from pretrain.checkpoint.homes.folder import FolderHome
from pretrain.distributed.fragments import Fragment, whole


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"model/a": (7, 5), "exp_avg/a": (7, 5), "model/b.weight": (13,), "model/scalar": ()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def fragments(tensors: dict[str, torch.Tensor]) -> list[Fragment]:
    return [whole(name, tensor) for name, tensor in tensors.items()]


def zeros() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}


def newest(store: CheckpointStore) -> Metadata:
    """Load the newest valid checkpoint and return its metadata."""
    metadata = store.load(lambda checkpoint: fragments(zeros()), set_aside=True)
    assert metadata is not None
    return metadata


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=3)


def test_read_returns_the_written_tensors(store: CheckpointStore):
    path = store.save(5, fragments(tensors()), {"position": {"step": 5}})
    target = zeros()
    metadata = verify(path)
    read(metadata, fragments(target))
    assert metadata.state == {"position": {"step": 5}}
    for name, tensor in tensors().items():
        assert torch.equal(target[name], tensor)


def write_checkpoint(folder: Path, name: str, owned_by_rank: list[list[Fragment]], state: dict[str, object]) -> Path:
    """Write a checkpoint of several ranks, as they would write it."""
    home = FolderHome(folder)
    draft = home.begin(name)
    contents = {f"rank-{rank:05d}.bin": owned_values(owned) for rank, owned in enumerate(owned_by_rank)}
    contents[LAYOUT] = memoryview(encode_layout([owned_ranges(owned) for owned in owned_by_rank]))
    *files, layout = (
        StoredFile(file, len(content), write_file(home, draft + file, content)) for file, content in contents.items()
    )
    home.commit(name, draft, encode_metadata(files, layout, state))
    return folder / name


def owned_values(owned: list[Fragment]) -> memoryview:
    return bytes_of(torch.cat([fragment.data for fragment in owned] or [torch.empty(0)]))


@pytest.mark.slow
@given(
    cuts=st.lists(st.integers(0, 35), max_size=4),
    ranks=st.integers(1, 3),
    block=st.integers(1, 10).map(lambda values: 4 * values),
    start=st.integers(0, 35),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_range_is_readable_from_any_written_ranges(tmp_path_factory, cuts, ranks, block, start, data):
    folder = tmp_path_factory.mktemp("ranges")
    tensor = torch.arange(35.0).view(7, 5)
    edges = sorted({0, 35, *cuts})
    parts = [Fragment("model/a", (7, 5), a, tensor.view(-1)[a:b]) for a, b in pairwise(edges)]
    parts = random.Random(0).sample(parts, len(parts))
    with pytest.MonkeyPatch.context() as patch:
        for module in (checkpoint_data, checkpoint_format):
            patch.setattr(module, "BLOCK_BYTES", block)
        patch.setattr(checkpoint_data, "WINDOW_BYTES", 2 * block)
        path = write_checkpoint(folder, "step-00000001", [parts[rank::ranks] for rank in range(ranks)], {})
        length = data.draw(st.integers(0, 35 - start))
        target = torch.zeros(length)
        read(verify(path), [Fragment("model/a", (7, 5), start, target)])
    assert torch.equal(target, torch.arange(start, start + length, dtype=torch.float32))


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([(0, 10), (12, 35)], "element 10 of model/a is owned by no rank"),
        ([(0, 10), (9, 35)], "element 9 of model/a is owned by two ranks"),
        ([(0, 34)], "element 34 of model/a is owned by no rank"),
        ([(0, 35), (0, 35)], "element 0 of model/a is owned by two ranks"),
    ],
)
def test_elements_not_owned_exactly_once_are_not_written(store: CheckpointStore, ranges, message):
    values = torch.arange(35.0)
    with pytest.raises(CheckpointError, match=message):
        store.save(1, [Fragment("model/a", (35,), a, values[a:b]) for a, b in ranges], {})
    assert store.committed() == []


def damage(folder: Path, draw: random.Random) -> str:
    """Damage a random file of a checkpoint and return a description of the damage."""
    file = draw.choice(sorted(folder.iterdir()))
    content = bytearray(file.read_bytes())
    kind = draw.choice(["flip", "cut", "grow", "delete"])
    if kind == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del content[draw.randrange(len(content)) :]
    elif kind == "grow":
        content += b"more"
    if kind == "delete":
        file.unlink()
    else:
        file.write_bytes(content)
    return f"{kind} in {file.name}"


@pytest.mark.slow
def test_every_kind_of_damage_is_found_before_any_tensor_changes(tmp_path: Path):
    """Damage the files of a checkpoint of three ranks 400 times; each load takes the previous checkpoint instead."""
    store = CheckpointStore(tmp_path / "home", keep=3)
    before = tensors()
    after = {name: tensor + 1 for name, tensor in before.items()}
    for step, values in ((1, before), (2, after)):
        owned = [[fragment.share(rank, 3) for fragment in fragments(values)] for rank in range(3)]
        write_checkpoint(tmp_path / "home", store.path(step).name, owned, {"step": step})
    kept = shutil.copytree(store.path(2), tmp_path / "kept")
    draw = random.Random(0)
    live = zeros()

    def untouched(checkpoint: Metadata) -> list[Fragment]:
        assert not any(tensor.any() for tensor in live.values())
        return fragments(live)

    for number in range(400):
        description = damage(store.path(2), draw)
        loaded = store.load(untouched)
        assert loaded.state == {"step": 1}, f"round {number}: {description} was not noticed"
        for name, tensor in live.items():
            assert torch.equal(tensor, before[name])
            tensor.zero_()
        shutil.rmtree(store.path(2))
        shutil.copytree(kept, store.path(2))
    assert store.load(untouched).state == {"step": 2}


def test_invalid_checkpoint_is_quarantined_with_its_reason_and_the_previous_one_is_loaded(store: CheckpointStore):
    for step in (1, 2, 3):
        store.save(step, fragments(tensors()), {"step": step})
    data = store.path(3) / "rank-00000.bin"
    data.write_bytes(data.read_bytes()[:-1])
    (store.path(2) / "metadata.json").unlink()
    assert newest(store).state == {"step": 1}
    assert sorted(p.name for p in store.folder.iterdir()) == [
        "step-00000001",
        "step-00000002.invalid",
        "step-00000003.invalid",
    ]
    assert (
        "is shorter than the file that was written" in (store.folder / "step-00000003.invalid/invalid.txt").read_text()
    )
    store.save(3, fragments(tensors()), {"step": 3})
    assert newest(store).state == {"step": 3}


def test_files_of_a_killed_writer_are_not_a_checkpoint(store: CheckpointStore):
    store.save(1, fragments(tensors()), {})
    half = store.folder / "step-00000002.0123456789ab.partial"
    half.mkdir()
    (half / "rank-00000.bin").write_bytes(b"half")
    assert newest(store).folder == store.path(1)
    store.save(2, fragments(tensors()), {})
    assert newest(store).folder == store.path(2)


def test_files_of_killed_processes_are_swept(store: CheckpointStore):
    """The process was killed while it wrote one checkpoint and deleted another."""
    for step in (1, 2, 3):
        store.save(step, fragments(tensors()), {})
    shutil.copytree(store.path(1), store.folder / "step-00000000.deleting")
    (store.folder / "step-00000000.deleting/metadata.json").unlink()
    shutil.copytree(store.path(1), store.folder / "step-00000137.0123456789ab.partial")
    store.sweep()
    assert sorted(store.folder.iterdir()) == store.committed() == [store.path(step) for step in (1, 2, 3)]


def test_run_without_a_valid_checkpoint_does_not_start_from_step_0(store: CheckpointStore):
    store.save(1, fragments(tensors()), {})
    (store.path(1) / "rank-00000.bin").unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* is valid"):
            newest(store)


def test_load_without_a_checkpoint_returns_none(store: CheckpointStore):
    assert store.load(lambda checkpoint: []) is None


def test_newest_checkpoints_are_kept(store: CheckpointStore):
    for step in range(1, 6):
        store.save(step, fragments(tensors()), {})
    assert store.committed() == [store.path(step) for step in (3, 4, 5)]


def test_keep_every_keeps_checkpoints_permanently(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep=1, keep_every=3)
    for step in range(1, 8):
        store.save(step, fragments(tensors()), {})
    assert store.committed() == [store.path(step) for step in (3, 6, 7)]


def test_keep_none_keeps_all_checkpoints(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep=None)
    for step in range(1, 8):
        store.save(step, fragments(tensors()), {})
    assert len(store.committed()) == 7


def test_only_valid_checkpoints_count_as_kept(store: CheckpointStore):
    for step in (1, 2, 3):
        store.save(step, fragments(tensors()), {})
    data = store.path(2) / "rank-00000.bin"
    data.write_bytes(bytes(len(data.read_bytes())))
    again = CheckpointStore(store.folder, keep=3)
    again.save(4, fragments(tensors()), {})
    assert again.committed() == [again.path(step) for step in (1, 3, 4)]
    again.save(5, fragments(tensors()), {})
    assert again.committed() == [again.path(step) for step in (3, 4, 5)]


def test_save_holds_the_values_at_its_start(store: CheckpointStore):
    live = tensors()
    for step in (1, 2):
        store.begin(step, fragments(live), {"step": step})
        store.wait_for_copy()
        for tensor in live.values():
            tensor.add_(1)
    store.finish()
    for step in (1, 2):
        target = zeros()
        read(verify(store.path(step)), fragments(target))
        for name, tensor in tensors().items():
            assert torch.equal(target[name], tensor + (step - 1))


def test_owned_ranges_may_change_between_two_saves(store: CheckpointStore):
    store.save(1, fragments(tensors()), {})
    fewer = {"model/a": tensors()["model/a"]}
    store.save(2, fragments(fewer), {})
    assert read_metadata(store.path(2)).tensors.keys() == fewer.keys()


def test_failed_asynchronous_save_is_reported_and_keeps_the_previous_checkpoint(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
):
    store.save(1, fragments(tensors()), {})
    store.begin(2, fragments(tensors()), {"not JSON": object()})
    with pytest.raises(CheckpointError, match="cannot write a checkpoint: Object of type object"):
        store.finish()
    assert "checkpoint of step 2: " in caplog.text
    store.finish()
    assert store.committed() == [store.path(1)] and not list(store.folder.glob("*.partial"))
    store.save(2, fragments(tensors()), {})
    assert newest(store).folder == store.path(2)


def start_of(folder: Path) -> tuple[Fence, CheckpointStore]:
    fence = Fence(folder / "generation")
    fence.mark = fence.claim()
    store = CheckpointStore(folder / "checkpoints", keep=3, fence=fence.check_everywhere)
    store.sweep()
    return fence, store


def test_only_the_newest_start_of_a_run_commits(tmp_path: Path):
    old, old_store = start_of(tmp_path)
    old_store.save(1, fragments(tensors()), {})
    new, new_store = start_of(tmp_path)
    assert (old.holds, new.holds) == (False, True)
    with pytest.raises(FencedError, match="start 2 of this run has taken over from this one, start 1"):
        old.check()
    with pytest.raises(CheckpointError, match="has taken over"):
        old_store.save(2, fragments(tensors()), {})
    assert new_store.committed() == [new_store.path(1)]
    new_store.save(2, fragments(tensors()), {})


def test_error_of_a_fenced_start_names_the_reason(tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    fence, store = start_of(folder)
    note = folder / "generation"
    mark = note.read_bytes()
    for content in (b"", b"\0" * 4, b"words", b"\xff\xfe"):
        note.write_bytes(content)
        assert not fence.holds
        with pytest.raises(
            FencedError, match=f"{note} is damaged: this start cannot know whether a newer one has taken"
        ):
            fence.check()
    note.unlink()
    with pytest.raises(FencedError, match=f"{note} was removed while the run trained: this start cannot know whether"):
        fence.check()
    note.write_bytes(mark)
    fence.check()
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(
        FencedError, match=f"the run folder {folder} was removed or renamed while the run trained in it"
    ):
        fence.check()
    with pytest.raises(CheckpointError, match="was removed or renamed"):
        store.save(1, fragments(tensors()), {})
    assert not folder.exists()


@pytest.mark.parametrize("checks", range(4))
def test_save_names_a_folder_that_is_removed_after_a_check(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, checks: int
):
    """The folder goes after the given check of the fence has passed, and before what the check permits."""
    folder = tmp_path / "run"
    folder.mkdir()
    fence, _ = start_of(folder)
    passed: list[None] = []

    def check() -> None:
        fence.check()
        passed.append(None)
        if len(passed) == checks + 1:
            folder.rename(tmp_path / "elsewhere")

    store = CheckpointStore(folder / "checkpoints", keep=3, fence=check)
    with pytest.raises(CheckpointError, match="was removed or renamed"):
        store.save(1, fragments(tensors()), {})
    assert "Errno" not in caplog.text and not folder.exists()


def test_start_after_a_damaged_generation_file_still_fences_the_older_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    old, _ = start_of(tmp_path)
    (tmp_path / "generation").write_bytes(b"\0" * 4)
    new, _ = start_of(tmp_path)
    assert f"{tmp_path}/generation is damaged" in caplog.text
    assert old.mark is not None and new.mark is not None
    assert old.mark.split()[0] == new.mark.split()[0] == "1"  # the number is lost, but the unique word is not
    assert (old.holds, new.holds) == (False, True)


def test_one_of_two_simultaneous_starts_holds_the_fence(tmp_path: Path):
    fences = [Fence(tmp_path / "generation") for _ in range(2)]
    for fence in fences:
        fence.mark = fence.claim()
    (tmp_path / "generation").write_text(fences[1].mark.replace("2 ", "1 ") + "\n")
    fences[1].mark = fences[1].mark.replace("2 ", "1 ")
    assert [fence.mark.split()[0] for fence in fences] == ["1", "1"]
    assert [fence.holds for fence in fences] == [False, True]


def test_delayed_commit_of_an_older_start_fails(tmp_path: Path):
    """The older start checks the fence and is delayed, a newer start begins, and then the older one renames."""
    home = FolderHome(tmp_path / "checkpoints")
    draft = home.begin("step-00000002")
    _, new_store = start_of(tmp_path)
    new_draft = home.begin("step-00000002")
    with pytest.raises(OSError):
        home.commit("step-00000002", draft, b"{}")
    home.abandon(draft)
    assert new_store.committed() == []
    assert (home.location / new_draft).is_dir()


def test_checkpoint_of_another_model_is_refused_and_changes_nothing(store: CheckpointStore):
    metadata = verify(store.save(1, fragments(tensors()), {}))
    target = zeros()
    for wrong, message in (
        (Fragment("model/c", (2,), 0, torch.zeros(2)), "it has no tensor model/c"),
        (Fragment("model/a", (5, 7), 0, torch.zeros(35)), r"has shape \[7, 5\], and this run's has \[5, 7\]"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read(metadata, [*fragments(target), wrong])
    assert not any(tensor.any() for tensor in target.values())


def test_checkpoint_holds_json_and_raw_tensors_without_pickle(store: CheckpointStore):
    path = store.save(1, fragments(tensors()), {})
    assert sorted(p.name for p in path.iterdir()) == ["layout.json", "metadata.json", "rank-00000.bin"]
    assert (path / "rank-00000.bin").stat().st_size == 4 * (35 + 35 + 13 + 1)
