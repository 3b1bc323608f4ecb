"""Values of checkpoints: NaN and infinity are found, reported, saved separately, and never resumed from."""

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from pretrain.checkpoint import CheckpointError, CheckpointStore, NotFiniteError, read_metadata, verify
from pretrain.checkpoint.data import bytes_of, write_file
from pretrain.checkpoint.format import LAYOUT, StoredFile, encode_layout, encode_metadata, owned_ranges
from pretrain.checkpoint.homes.folder import FolderHome
from pretrain.checkpoint.values import CACHED_ELEMENTS, copy_and_look, is_finite
from pretrain.distributed.fragments import Fragment, whole
from pretrain.training.callbacks.base import CALLBACKS, Callback, register_callback
from pretrain.training.run import TrainingRun
from pretrain.training.weights import find_checkpoint
from tests.commands import run_here as command

BAD = [math.nan, -math.nan, math.inf, -math.inf]


@given(st.lists(st.integers(0, 2**32 - 1), max_size=9))
def test_finite_check_agrees_with_numpy_for_any_bits(bits: list[int]):
    values = np.array(bits, np.uint32).view(np.float32)
    assert is_finite(values) == bool(np.isfinite(values).all())


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("place", [0, CACHED_ELEMENTS - 1, CACHED_ELEMENTS, 2 * CACHED_ELEMENTS + 2])
def test_copy_finds_the_tensors_with_non_finite_values(bad: float, place: int):
    sources = [torch.full((2 * CACHED_ELEMENTS + 3,), -3e38), torch.full((5,), 3e38), torch.zeros(0)]
    sources[0][place] = bad
    targets = [torch.zeros_like(source) for source in sources]
    assert copy_and_look(targets, sources) == [0]
    assert all(np.array_equal(t.numpy(), s.numpy(), equal_nan=True) for t, s in zip(targets, sources, strict=True))


def fragments(bad: float | None = None) -> list[Fragment]:
    tensors = {name: torch.ones(10) for name in ("model/a", "exp_avg/a", "exp_avg_sq/a", "memory/states")}
    tensors["memory/states"][0] = math.nan  # undefined if a row started later
    if bad is not None:
        tensors["exp_avg_sq/a"][3:5] = bad
    return [whole(name, tensor) for name, tensor in tensors.items()]


def zeros(*_: object) -> list[Fragment]:
    return [whole(fragment.name, torch.zeros(10)) for fragment in fragments()]


@pytest.mark.parametrize("bad", BAD)
def test_non_finite_save_is_written_separately_and_the_last_finite_one_is_kept(tmp_path: Path, bad: float):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(4, fragments(), {"step": 4})
    for step in (8, 12, 12):
        store.save(step, fragments(bad), {"step": step})
        text = rf"NaN or infinite in exp_avg_sq/a \(2\) since a step from 5 to {step}; all were finite after step 4$"
        with pytest.raises(NotFiniteError, match=text):
            store.check_finite()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000004",
        "step-00000008.post-mortem",
        "step-00000012.post-mortem",
    ]
    metadata = read_metadata(tmp_path / "step-00000012.post-mortem")
    assert (metadata.not_finite, metadata.state) == ({"exp_avg_sq/a": 2}, {"step": 12})
    assert verify(tmp_path / "step-00000012.post-mortem").not_finite == {"exp_avg_sq/a": 2}
    again = CheckpointStore(tmp_path, keep=1)
    again.sweep()
    assert again.load(zeros).state == {"step": 4}
    assert again.newest_valid().state == {"step": 4}
    assert (again.finite_step, again.prune(), len(list(tmp_path.iterdir()))) == (4, [], 3)


def write_earlier(home: FolderHome, step: int, values: list[Fragment]) -> None:
    """Write a checkpoint without metadata about its values, as an earlier version did."""
    name = f"step-{step:08d}"
    draft = home.begin(name)
    contents = {"rank-00000.bin": bytes_of(torch.cat([fragment.data for fragment in values]))}
    contents[LAYOUT] = memoryview(encode_layout([owned_ranges(values)]))
    *files, layout = (StoredFile(f, len(c), write_file(home, draft + f, c)) for f, c in contents.items())
    home.commit(name, draft, encode_metadata(files, layout, {"step": step}))


def test_values_of_an_earlier_format_are_unknown_until_they_are_read(tmp_path: Path):
    home = FolderHome(tmp_path)
    for step, bad in ((1, None), (2, math.inf), (3, math.nan)):
        write_earlier(home, step, fragments(bad))
    assert read_metadata(tmp_path / "step-00000003").not_finite is None
    assert verify(tmp_path / "step-00000003").not_finite == {"exp_avg_sq/a": 2}
    assert verify(tmp_path / "step-00000001").not_finite == {}
    store = CheckpointStore(tmp_path, keep=1)
    assert store.newest_valid().state == {"step": 1}
    assert store.load(zeros, set_aside=True).state == {"step": 1}
    assert "NaN or infinite in exp_avg_sq/a (2)" in (tmp_path / "step-00000003.invalid/invalid.txt").read_text()


def test_non_finite_checkpoint_of_an_earlier_format_does_not_count_as_kept(tmp_path: Path):
    for step, bad in ((1, None), (2, math.inf)):
        write_earlier(FolderHome(tmp_path), step, fragments(bad))
    store = CheckpointStore(tmp_path, keep=2)
    store.save(3, fragments(), {})
    assert store.committed() == [store.path(1), store.path(3)]


# Runs


class PoisonConfig(BaseModel, frozen=True, extra="forbid"):
    """Value that a tensor gets after a step."""

    step: int
    kind: str
    value: Literal["inf", "nan"]


class Poison(Callback):
    """Callback that writes a non-finite value to a fragment."""

    def __init__(self, config: PoisonConfig) -> None:
        self._config = config

    def after_step(self, run: TrainingRun, numbers: object) -> None:
        """Set the value."""
        if run.step == self._config.step:
            fragment = next(f for f in run.engine.fragments() if f.name.startswith(f"{self._config.kind}/"))
            fragment.data[0] = float(self._config.value)


@pytest.fixture(scope="module", autouse=True)
def poison() -> None:
    if "poison" not in CALLBACKS.names():
        register_callback("poison", PoisonConfig)(Poison)


@pytest.fixture
def train(recipe: Path, tmp_path: Path) -> Any:
    """Train a run of six steps with a checkpoint every two, one of which is kept."""
    tree = yaml.safe_load(recipe.read_text())
    tree["validation"] = {"shards": None}
    tree["train"]["steps"] = 6
    tree["health"] = {"non_finite": "stop"}
    tree["checkpoint"] = {"every": 2, "keep": 1, "asynchronous": False}
    recipe.write_text(yaml.safe_dump(tree))
    return lambda *options: command("train", recipe, f"run.root={tmp_path}", *options)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.slow
def test_run_with_too_high_a_learning_rate_keeps_its_last_finite_checkpoint_and_resumes(train: Any, tmp_path: Path):
    run = tmp_path / "run"
    assert train("train.steps=4")[0] == 0
    code, output = train("optimizer.learning_rate=1e30")
    assert code == 1 and "step 6, sequences 30 to 35: the gradient is not finite" in output, output
    assert "since step 5; all were finite after step 4" in output or "after step 5 are finite" in output, output
    assert "no parameter was changed" not in output and "the next start resumes after step 4" in output, output
    assert names(run) == ["step-00000004", "step-00000005.post-mortem"]
    code, output = train()
    assert code == 0, output
    assert names(run) == ["step-00000005.post-mortem", "step-00000006"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["exp_avg_sq", "model"])
def test_run_with_non_finite_values_stops_and_saves_them(train: Any, tmp_path: Path, kind: str):
    poisoned = [f"callbacks.poison.{field}" for field in (f"kind={kind}", "value=inf", "step=3")]
    code, output = train(*poisoned)
    assert code == 1, output
    assert names(tmp_path / "run")[0] == "step-00000002"
    if kind == "model":
        assert "step 4, " in output and "NaN or infinite in model/" in output and "since step 3; all were" in output, (
            output
        )
    else:
        assert (
            f"NaN or infinite in {kind}/" in output
            and "since a step from 3 to 4; all were finite after step 2" in output
        )
    code, output = train()
    assert code == 0 and names(tmp_path / "run")[-1] == "step-00000006", output


@pytest.mark.slow
def test_run_that_ends_with_non_finite_values_has_failed(train: Any, tmp_path: Path):
    code, output = train("callbacks.poison.kind=exp_avg", "callbacks.poison.value=nan", "callbacks.poison.step=6")
    assert code == 1 and "since a step from 5 to 6" in output, output
    assert names(tmp_path / "run") == ["step-00000004", "step-00000006.post-mortem"]


@pytest.mark.slow
def test_commands_check_values_and_report_them(train: Any, tmp_path: Path):
    run, home = tmp_path / "run", tmp_path / "run/checkpoints"
    assert train("train.steps=4")[0] == 0
    for kind, step in (("model", 5), ("exp_avg", 6)):
        fields = (f"kind={kind}", "value=inf", f"step={step}")
        train(f"train.steps={step}", *(f"callbacks.poison.{field}" for field in fields))
    weights, moments = home / "step-00000005.post-mortem", home / "step-00000006.post-mortem"
    assert "every value is finite" in command("checkpoint", "verify", home / "step-00000004")[1]
    code, output = command("checkpoint", "verify", weights)
    assert code == 1 and "not valid: every byte is as it was written, with values that are NaN or infinite" in output
    code, output = command("checkpoint", "export", weights, "--out", tmp_path / "no")
    assert code == 1 and "NaN or infinite in model/" in output and not (tmp_path / "no").exists()
    assert "all finite" in command("checkpoint", "export", run, "--out", tmp_path / "yes")[1]
    with pytest.raises(CheckpointError, match="NaN or infinite in model/"):
        find_checkpoint(weights)
    new = ("run.name=new", f"initialize.weights={moments}", "train.steps=1")
    code, output = train(*new, "initialize.moments=true")
    assert code == 1 and "set initialize.moments=false, or name an earlier checkpoint" in output, output
    code, output = train(*new)
    assert code == 0, output
    assert "finite" in command("checkpoint", "list", run)[1]
