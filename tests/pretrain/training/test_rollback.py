"""`byteloom checkpoint rollback`: a run returns to the checkpoint of an earlier step."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.checkpoint.homes.fence import Fence, FencedError
from pretrain.training.run_folder import RunFolder
from pretrain.training.run_status import status_of
from tests.commands import run_here
from tests.conftest import recipe_tree
from tests.distributed.parity import content

REASON = "the loss rose after a bad corpus"


@pytest.fixture(scope="module")
def finished(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the recipe of a finished run of six steps with a checkpoint of every second step; tests copy it."""
    folder = tmp_path_factory.mktemp("finished")
    tree: Any = recipe_tree(corpus_folder)
    tree["run"]["root"] = str(folder / "runs")
    tree["train"]["steps"] = 6
    tree["validation"] = {"shards": None}
    tree["checkpoint"] = {"every": 2}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    code, output = run_here("train", recipe)
    assert code == 0, output
    return recipe


@pytest.fixture
def run(finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Path:
    caplog.set_level("INFO", "pretrain")
    return Path(shutil.copytree(finished.parent / "runs/run", tmp_path / "run"))


def roll_back(run: Path, step: int = 2, reason: str = REASON) -> tuple[int, str]:
    return run_here("checkpoint", "rollback", run, step, "--reason", reason)


def rollbacks(run: Path) -> list[dict[str, Any]]:
    return list(json.loads((run / "run.json").read_text()).get("rollbacks", []))


def records(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]


def losses(journal: Path) -> dict[int, float]:
    return {each["step"]: each["train/bits_per_byte"] for each in records(journal) if each["step"]}


@pytest.mark.slow
def test_later_checkpoints_are_set_aside_and_the_next_start_resumes_exactly(run: Path, finished: Path):
    code, output = roll_back(run)
    assert code == 0 and f"rolled back from step 6 to step 2: {REASON}; the next start resumes after step 2" in output
    checkpoints = run / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "step-00000002", "step-00000004.invalid", "step-00000006.invalid",
    ]  # fmt: skip
    for step in (4, 6):
        aside = checkpoints / f"step-{step:08d}.invalid"
        assert (aside / "invalid.txt").read_text() == f"rolled back from step 6 to step 2: {REASON}\n"
        before = finished.parent / f"runs/run/checkpoints/step-{step:08d}"
        assert (aside / "rank-00000.bin").read_bytes() == (before / "rank-00000.bin").read_bytes()
    [rollback] = rollbacks(run)
    assert (rollback["from_step"], rollback["to_step"], rollback["reason"]) == (6, 2, REASON)
    assert [each["step"] for each in records(run / "metrics.jsonl")] == [1, 2]
    journal = finished.parent / "runs/run/metrics.jsonl"
    assert (run / "metrics.jsonl.until-6").read_bytes() == journal.read_bytes()
    status = status_of(run)
    assert (status.step, status.checkpoint_step, status.starts, status.state) == (2, 2, 1, "stopped")
    assert f"rolled back from step 6 to step 2: {REASON}" in run_here("status", run)[1]

    for _ in range(2):
        code, output = run_here("train", finished, f"run.root={run.parent}")
        assert code == 0, output
    assert losses(run / "metrics.jsonl") == losses(journal)
    assert content(checkpoints / "step-00000006") == content(finished.parent / "runs/run/checkpoints/step-00000006")
    log = (run / "train.log").read_text()
    assert log.count(f"rolled back from step 6 to step 2: {REASON}") == 1
    assert "resumes after step 2" in log and rollbacks(run) == [rollback]
    assert status_of(run).starts == 3


def test_interrupted_rollback_is_completed_and_recorded_once(run: Path):
    roll_back(run)
    checkpoints = run / "checkpoints"
    shutil.move(checkpoints / "step-00000004.invalid", checkpoints / "step-00000004")
    (checkpoints / "step-00000004/invalid.txt").unlink()
    code, output = roll_back(run, reason="again")
    assert code == 0 and [path.name for path in checkpoints.glob("*[0-9]")] == ["step-00000002"], output
    [rollback] = rollbacks(run)
    assert (rollback["from_step"], rollback["to_step"], rollback["reason"]) == (6, 2, "again")
    assert status_of(run).starts == 1


def test_second_rollback_to_an_earlier_step_continues_the_first(run: Path):
    roll_back(run, 4)
    code, output = roll_back(run, 2)
    assert code == 0, output
    [rollback] = rollbacks(run)
    assert (rollback["from_step"], rollback["to_step"]) == (6, 2)


def test_rollback_fences_off_an_older_process(run: Path):
    folder = RunFolder(run)
    older = Fence(folder.generation)
    older.mark = folder.generation.read_text().rstrip("\n")
    older.check_everywhere()
    roll_back(run)
    with pytest.raises(FencedError, match="start 2 of this run has taken over"):
        older.check_everywhere()


def test_living_run_missing_step_and_newest_step_are_refused_and_nothing_changes(run: Path):
    def files() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}

    before = files()
    with RunFolder(run).locked():
        code, output = roll_back(run)
        assert code == 1 and f"{run} is running; stop it first: byteloom cancel {run}" in output, output
    code, output = roll_back(run, 3)
    assert code == 1 and "has no checkpoint of step 3; it has those of steps 2, 4, 6" in output, output
    code, output = roll_back(run, 6)
    assert code == 1 and "is the newest checkpoint already" in output, output
    code, output = roll_back(run, 2, reason=" ")
    assert code == 1 and "the reason of a rollback is empty" in output, output
    assert files() == before


def test_damaged_or_foreign_target_is_refused(run: Path):
    data = run / "checkpoints/step-00000002/rank-00000.bin"
    data.write_bytes(bytes(len(data.read_bytes())))
    code, output = roll_back(run)
    assert code == 1 and "rank-00000.bin is damaged" in output, output
    identity = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**identity, "id": "other"}))
    code, output = roll_back(run, 4)
    assert code == 1 and "and this is run other" in output, output
    assert not list((run / "checkpoints").glob("*.invalid"))
