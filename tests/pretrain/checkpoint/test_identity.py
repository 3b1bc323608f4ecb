"""Identity of checkpoints: the content of a checkpoint matches its place, its run and the earlier checkpoints."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.checkpoint import CheckpointStore, InvalidCheckpointError, read_metadata, verify
from pretrain.conformance import Subject
from pretrain.distributed.fragments import whole
from pretrain.models import all_families, build_model, small_config
from pretrain.training.weights import find_checkpoint, model_changes
from tests.commands import run_here
from tests.conftest import recipe_tree
from tests.distributed.starts import Start

BATCH = 6


def state(step: int, generation: int = 1, run: str = "own", batch: int = BATCH) -> dict[str, Any]:
    reading = {"step": step, "next_sequence": BATCH * step, "batches": [[0, 0, batch]]}
    return {"run": run, "generation": generation, "reading": reading}


def save(store: CheckpointStore, step: int, **fields: Any) -> None:
    store.save(step, [whole("model/a", torch.arange(100.0) + step)], state(step, **fields))


def loaded_step(store: CheckpointStore) -> int:
    """Load the newest checkpoint, check that its values are those of its step, and return the step."""
    live = torch.zeros(100)
    metadata = store.load(lambda checkpoint: [whole("model/a", live)], set_aside=True)
    assert metadata is not None
    step = metadata.state["reading"]["step"]
    assert torch.equal(live, torch.arange(100.0) + step)
    return int(step)


def reason(store: CheckpointStore, name: str) -> str:
    return (store.folder / f"{name}.invalid/invalid.txt").read_text()


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints", keep=3, run="own")
    for step in (10, 20):
        save(store, step)
    return store


@pytest.mark.parametrize("is_link", [False, True])
def test_copy_or_link_under_a_newer_name_is_quarantined_and_later_saves_work(store: CheckpointStore, is_link: bool):
    if is_link:
        store.path(30).symlink_to(store.path(10), target_is_directory=True)
    else:
        shutil.copytree(store.path(10), store.path(30))
    with pytest.raises(InvalidCheckpointError, match="symbolic link" if is_link else "holds step 10, and not the step"):
        verify(store.path(30))
    assert loaded_step(store) == 20
    save(store, 30)
    assert loaded_step(store) == 30
    assert verify(store.path(10)).state == state(10)
    aside = store.folder / "step-00000030.invalid"
    if is_link:
        assert aside.is_symlink() and "symbolic link" in (store.folder / "step-00000030.invalid.txt").read_text()
        assert not (store.path(10) / "invalid.txt").exists()
    else:
        assert "holds step 10" in reason(store, "step-00000030")


def test_link_instead_of_a_data_file_is_not_followed(store: CheckpointStore, tmp_path: Path):
    data = store.path(20) / "rank-00000.bin"
    data.rename(tmp_path / "elsewhere.bin")
    data.symlink_to(tmp_path / "elsewhere.bin")
    assert loaded_step(store) == 10
    assert "rank-00000.bin is a symbolic link" in reason(store, "step-00000020")


def test_user_may_load_a_link_or_a_copy_under_another_name(store: CheckpointStore, tmp_path: Path):
    (tmp_path / "latest").symlink_to(store.path(20))
    shutil.copytree(store.path(10), tmp_path / "backup")
    assert verify(tmp_path / "latest").state == state(20)
    assert verify(tmp_path / "backup").state == state(10)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "run": ({"run": "other"}, "belongs to run other, and this is run own"),
    "generation": ({"generation": 1}, "was written by start 1, and step-00000025 by start 2"),
    "batches": ({"generation": 2, "batch": 5}, "holds sequence 180 as the next after step 30, and its batches make it"),
}


@pytest.mark.parametrize(("fields", "message"), WRONG.values(), ids=WRONG.keys())
def test_checkpoint_that_does_not_continue_the_run_is_quarantined(
    store: CheckpointStore, fields: dict[str, Any], message: str
):
    """Start 2 resumed from step 20; then a foreign checkpoint of step 30 appears."""
    save(store, 25, generation=2)
    foreign = CheckpointStore(store.folder.parent / "foreign", keep=3)
    save(foreign, 30, **{"generation": 2, **fields})
    shutil.copytree(foreign.path(30), store.path(30))
    assert loaded_step(store) == 25
    assert message in reason(store, "step-00000030")


def test_checkpoint_that_appears_during_training_is_not_counted(store: CheckpointStore):
    """One has the step of the next save, another a later step that would count as the newest."""
    store.path(30).mkdir()
    shutil.copytree(store.path(20), store.path(40))
    one = CheckpointStore(store.folder, keep=1, run="own")
    save(one, 30)
    assert one.committed() == [one.path(30)]
    left = sorted(path.name for path in one.folder.iterdir())
    assert left == ["step-00000030", "step-00000030.invalid", "step-00000040.invalid"]


def test_old_foreign_checkpoint_is_quarantined_and_not_deleted(store: CheckpointStore):
    foreign = CheckpointStore(store.folder.parent / "foreign", keep=3)
    save(foreign, 5, run="other")
    shutil.copytree(foreign.path(5), store.path(5))
    save(store, 30)
    save(store, 40)
    assert "belongs to run other" in reason(store, "step-00000005")


def test_every_quarantined_checkpoint_of_a_step_is_kept(store: CheckpointStore):
    for number in range(3):
        shutil.copytree(store.path(10), store.path(30))
        (store.path(30) / "mark").write_text(str(number))
        assert loaded_step(store) == 20
    marks = sorted((path / "mark").read_text() for path in store.folder.glob("step-00000030*.invalid"))
    assert marks == ["0", "1", "2"]


def test_checkpoint_of_an_earlier_format_without_identity_is_accepted(store: CheckpointStore):
    old = {"run": "of an earlier folder", "reading": {"step": 30, "next_sequence": 180}}
    store.save(30, [whole("model/a", torch.arange(100.0) + 30)], old)
    assert loaded_step(store) == 30


@pytest.mark.slow
@given(copies=st.lists(st.tuples(st.sampled_from([10, 20, 30]), st.integers(1, 60), st.booleans()), max_size=6))
@settings(max_examples=15, deadline=None)
def test_newest_own_checkpoint_is_loaded_among_any_copies_and_links(tmp_path_factory, copies):
    store = CheckpointStore(tmp_path_factory.mktemp("home"), keep=None, run="own")
    for step in (10, 20, 30):
        save(store, step)
    for source, target, is_link in copies:
        if not store.path(target).exists() and not store.path(target).is_symlink():
            if is_link:
                store.path(target).symlink_to(store.path(source))
            else:
                shutil.copytree(store.path(source), store.path(target))
    assert loaded_step(store) == 30
    save(store, 61)
    assert loaded_step(store) == 61


# Runs


@pytest.fixture
def short(recipe: Path) -> Path:
    """Return the recipe of a run of two steps, with a checkpoint after each."""
    tree = yaml.safe_load(recipe.read_text())
    tree["validation"] = {"shards": None}
    tree["train"]["steps"] = 2
    tree["checkpoint"] = {"every": 1, "keep": 5}
    recipe.write_text(yaml.safe_dump(tree))
    return recipe


@pytest.mark.slow
def test_run_resumes_from_its_newest_valid_checkpoint_among_copies(
    short: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    root = f"run.root={tmp_path}"
    assert run_here("train", short, root)[0] == 0
    home = tmp_path / "run/checkpoints"
    shutil.copytree(home / "step-00000001", home / "step-00000003")
    assert run_here("train", short, root, "train.steps=4", "model.dropout=0.2")[0] == 0
    assert f"resumes after step 2, from {home}/step-00000002; all values are finite" in caplog.text
    assert "changed since that checkpoint: model.dropout: 0.1 -> 0.2" in caplog.text
    assert [verify(path).state["reading"]["step"] for path in sorted(home.glob("step-*[0-9]"))] == [1, 2, 3, 4]
    states = [read_metadata(home / f"step-{step:08d}").state for step in (1, 4)]
    assert [each["generation"] for each in states] == [1, 2] and states[0]["run"] == states[1]["run"]
    code, output = run_here("train", short, root, "train.steps=5", "model.activation=gelu")
    assert code == 1 and "model.activation: relu -> gelu" in output, output


OTHERS = (
    "model.activation=gelu",
    "train.seed=7",
    "model.dropout=0.3",
    "model.global_model.heads=4",
    "optimizer.learning_rate=1e-4",
)


@pytest.mark.slow
def test_home_belongs_to_one_run_and_another_run_is_refused(short: Path, tmp_path: Path):
    home = tmp_path / "shared"
    first = ("train", short, f"run.root={tmp_path}/first", f"checkpoint.home={home}")
    code, output = run_here(*first)
    assert code == 0, output
    owner = json.loads((home / "run/owner.json").read_text())
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    for change in OTHERS:
        code, output = run_here("train", short, f"run.root={tmp_path}/second", f"checkpoint.home={home}", change)
        assert code == 1 and f"{home}/run belongs to run {owner['run']}, which began in " in output, output
        assert change.partition("=")[0] in output and f"{tmp_path}/first/run" in output, output
        assert not (tmp_path / "second").exists()
    assert before == {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    begin = ("train", short, f"run.root={tmp_path}/second", f"checkpoint.home={home}", "run.name=new", OTHERS[1])
    code, output = run_here(*begin, f"initialize.weights={home}/run")
    assert code == 0 and find_checkpoint(home / "new/step-00000002").state["run"] != owner["run"], output
    code, output = run_here(*first[:2], f"run.root={tmp_path}/moved", *first[3:], "train.steps=3")
    assert code == 0, output
    assert find_checkpoint(home / "run/step-00000003").state["run"] == owner["run"]


@pytest.mark.slow
def test_run_whose_folder_links_to_the_checkpoints_of_another_run_is_refused(short: Path, tmp_path: Path):
    for name in ("one", "two"):
        code, output = run_here("train", short, f"run.root={tmp_path}", f"run.name={name}")
        assert code == 0, output
    one, two = (tmp_path / name / "checkpoints" for name in ("one", "two"))
    shutil.rmtree(two)
    two.symlink_to(one)
    code, output = run_here("train", short, f"run.root={tmp_path}", "run.name=two", "train.steps=3")
    owner = read_metadata(one / "step-00000002").state["run"]
    assert code == 1 and f"{two} belongs to run {owner}; this is another run" in output, output
    assert sorted(path.name for path in one.iterdir()) == ["step-00000001", "step-00000002"]


@pytest.mark.slow
def test_home_belongs_to_its_run_while_two_runs_train(corpus_folder: Path, tmp_path: Path):
    """The first run has no checkpoint yet, and continues undisturbed."""
    tree: Any = recipe_tree(corpus_folder)
    tree["validation"] = {"shards": None}
    tree["run"] = {"name": "run", "root": str(tmp_path / "first")}
    tree["checkpoint"] = {"home": str(tmp_path / "shared"), "every": 1_000_000}
    tree["train"]["steps"] = 1_000_000
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    living = Start(recipe, 1, tmp_path / "output")
    try:
        while not (tmp_path / "first/run/metrics.jsonl").exists():
            living.wait(0.05)
            assert living.processes[0].exitcode is None, living.output
        code, output = run_here("train", recipe, f"run.root={tmp_path}/second", "model.activation=gelu")
        assert code == 1 and f"{tmp_path}/shared/run belongs to run " in output, output
        steps = len((tmp_path / "first/run/metrics.jsonl").read_text().splitlines())
        while len((tmp_path / "first/run/metrics.jsonl").read_text().splitlines()) < steps + 5:
            living.wait(0.05)
            assert living.processes[0].exitcode is None, living.output
    finally:
        living.processes[0].kill()
        living.processes[0].join()


@pytest.mark.parametrize("name", all_families())
def test_fields_that_may_change_do_not_change_the_function(name: str):
    own = small_config(name)
    free = all_families()[name].free_fields
    others = {
        "dropout": 0.5,
        "attention_dropout": 0.5,
        "dropout_places": "everywhere",
        "initial_std": 0.5,
        "cross_attend_dropout": 0.5,
        "zero_head": False,
        "cropping": "none",
        "pack_patches": False,
        "z_loss": 0.5,
        "kernel": "auto",
        "rate_multipliers": (2.0, 0.5),
        "parametrization": "fan_in",
    }
    torch.manual_seed(0)
    model = build_model(own).eval()
    arguments = Subject.of(name).arguments(2)
    for field in free & others.keys():
        changed = small_config(name, **{field: others[field]})
        assert model_changes(own.model_dump(mode="json"), changed) == []
        twin = build_model(changed).eval()
        twin.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert torch.equal(model(*arguments), twin(*arguments)), field
    # test_mamba has the law of a chunk, and test_entropy_patches that of the place of an entropy model
    assert free - others.keys() <= {"minimum_crop", "chunk", "mamba.chunk", "sequence_length", "patcher.model"}


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("perceiver_ar", "latents", 8),
        ("perceiver_ar", "rotary_fraction", 0.25),
        ("transformer", "window", 4),
        ("transformer_xl", "memory_length", 16),
        ("megabyte", "activation", "relu"),
    ],
)
def test_changed_fields_that_alter_the_function_but_no_shape_are_refused(name: str, field: str, value: object):
    own = small_config(name)
    [change] = model_changes(own.model_dump(mode="json"), small_config(name, **{field: value}))
    assert change.startswith(f"model.{field}: ")
