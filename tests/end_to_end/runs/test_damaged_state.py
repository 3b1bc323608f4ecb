"""Damaged state files of a run: commands report them in one line, and continue or refuse."""

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from launchers.supervision.heartbeat import read_beat
from launchers.supervision.plan import LaunchPlan
from launchers.supervision.record import LaunchRecord, last_submission
from pretrain.cli.app import app
from pretrain.terminal.console import run as run_command
from pretrain.tracking import Delivery, Journal, RunDescription, TrackingConfig, open_recorder
from pretrain.tracking.journal import read_journal
from pretrain.training import run_status
from pretrain.training.run_folder import RunFolderError
from pretrain.training.run_status import find_runs, statuses_of
from pretrain.training.weights import find_checkpoint
from pretrain.training.weights.results import logged_losses
from tests.conftest import recipe_tree
from tests.distributed.starts import Start, start, train
from tests.mlflow_server import client_of, make_store

STEPS = 12


@pytest.fixture(scope="module")
def trained_once(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a finished run, which tests copy."""
    folder = tmp_path_factory.mktemp("trained")
    train(tree_of(corpus_folder, folder), folder)
    return folder / "run"


@pytest.fixture
def run(trained_once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained_once, tmp_path / "runs/run")


def tree_of(corpus_folder: Path, root: Path, **train_fields: object) -> Any:
    tree: Any = recipe_tree(corpus_folder)
    tree["run"] = {"root": str(root), "name": "run"}
    tree["train"] |= train_fields
    return tree


def refusal(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the one line with which a command refuses."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        run_command(lambda: app([str(argument) for argument in arguments]))
    output = capfd.readouterr().err
    assert exit_info.value.code == 1, output
    assert output.startswith("error: ") and len(output.splitlines()) == 1, output
    return output


def status_of(run: Path) -> run_status.RunStatus:
    return statuses_of([run])[0]


RUN_JSON = (
    "restore it from a copy, or remove it and start with the recipe in config.yaml beside it: the run then continues "
    "from its checkpoints"
)


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b'{"id": "x"', b"[]", b'{"id": "x"}'])
def test_training_refuses_a_damaged_run_json_and_its_advice_works(run: Path, corpus_folder: Path, content: bytes):
    (run / "run.json").write_bytes(content)
    tree = tree_of(corpus_folder, run.parent, steps=STEPS + 2)
    before = (run / "metrics.jsonl").read_bytes()
    codes, output = start(tree, run.parent)
    assert codes == [1]
    assert output.startswith(f"error: {run}/run.json is damaged: ") and output.endswith(f"; {RUN_JSON}\n")
    assert (run / "metrics.jsonl").read_bytes() == before
    if not content:
        (run / "run.json").unlink()
        assert f"resumes after step {STEPS}" in train(tree, run.parent)


def test_training_replaces_a_damaged_generation_file_with_a_warning(run: Path, corpus_folder: Path):
    (run / "generation").write_bytes(b"\0" * 4)
    output = train(tree_of(corpus_folder, run.parent, steps=STEPS + 2), run.parent)
    assert f"warning: {run}/generation is damaged: it is empty or holds only zero bytes; " in output
    assert (run / "generation").read_text().startswith("2 ")  # its checkpoints are of start 1
    assert status_of(run).state == "finished"


def damaged_journal(run: Path) -> list[bytes]:
    """Add zero bytes before the third line and half a line before the fifth; return the original lines."""
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    content = [*lines[:2], b"\0" * 7 + lines[2], lines[3], lines[1][:20] + b"\n", *lines[4:]]
    (run / "metrics.jsonl").write_bytes(b"".join(content))
    return lines


def test_training_keeps_every_complete_line_of_a_damaged_journal(run: Path, corpus_folder: Path):
    lines = damaged_journal(run)
    damaged = (run / "metrics.jsonl").read_bytes()
    output = train(tree_of(corpus_folder, run.parent, steps=STEPS + 2), run.parent)
    path = run / "metrics.jsonl"
    assert f"warning: {path} is damaged in line 3: 7 bytes before its value belong to no line" in output
    assert f"warning: {path} is damaged in line 5: it is not JSON" in output
    assert f"{path}.damaged is a copy with them" in output
    assert path.read_bytes().startswith(b"".join(lines))
    assert [record["step"] for record in read_journal(path, pytest.fail)] == [*range(STEPS + 1), STEPS + 1, STEPS + 2]
    assert Path(f"{path}.damaged").read_bytes() == damaged


def test_journal_after_a_checkpoint_is_the_same_byte_for_byte(run: Path):
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines) + lines[3][:30])  # an incomplete last line
    Journal(run / "metrics.jsonl", 8).close()
    assert (run / "metrics.jsonl").read_bytes() == b"".join(lines[:9])
    assert not (run / "metrics.jsonl.damaged").exists()


def test_export_reads_its_scores_from_a_damaged_journal(run: Path):
    expected = logged_losses(find_checkpoint(run))
    damaged_journal(run)
    assert expected.keys() == {"train", "validation"}
    assert logged_losses(find_checkpoint(run)) == expected


def test_damaged_mlflow_json_is_rewritten_and_nothing_is_sent_twice(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
):
    state, journal = run / "mlflow.json", run / "metrics.jsonl"
    make_store(tmp_path / "mlflow.db")
    config = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    description = RunDescription("run", "identity", {"a": 1}, {}, STEPS, start=1, reason="manual", folder=run)

    def deliver() -> None:
        open_recorder(config, Journal(journal, STEPS), description).close("FINISHED")

    deliver()
    whole = Delivery.load(state)
    assert whole is not None and whole.delivered_step == STEPS
    for content in (b"", b"\0\0", b'{"uri": 3}'):
        state.write_bytes(content)
        assert f"{state} is damaged: " in refusal(capfd, "track", run)
        deliver()
        assert f"{state} is damaged: " in caplog.text
        again = Delivery.load(state)
        assert again is not None
        assert (again.run_id, again.delivered_step, again.status) == (whole.run_id, STEPS, "FINISHED")
    history = client_of(whole.uri).get_metric_history(whole.run_id, "train/bits_per_byte")
    assert sorted(metric.step for metric in history) == list(range(1, STEPS + 1))


SUBMITTED = '{"time": 1.0, "event": "submitted", "job": "4194304999", "nodes": []}\n'
STARTED = SUBMITTED.replace("submitted", "started")


def test_incomplete_line_in_the_launch_record_hides_no_other_line(run: Path, caplog: pytest.LogCaptureFixture):
    record = LaunchRecord(run)
    record.path.write_text(SUBMITTED + STARTED[:30] + STARTED + STARTED[:25])
    assert [launch.event for launch in record.read()] == ["submitted", "started"]
    record.append("failed", "4194304999", reason="it broke")
    assert [launch.event for launch in record.read()] == ["submitted", "started", "failed"]
    assert caplog.text.count("launches.jsonl is damaged in line 2: 30 bytes before its value belong to no line") == 1
    assert caplog.text.count("launches.jsonl is damaged in line 3: it is not JSON") == 1
    status = status_of(run)
    assert [launch["event"] for launch in status.history] == ["submitted", "started", "failed"]
    assert len(status.problems) == 2


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "an empty run.json": (
        lambda run: (run / "run.json").write_bytes(b""),
        "damaged",
        "run.json is damaged: it is empty",
    ),
    "a generation of zero bytes": (
        lambda run: (run / "generation").write_bytes(b"\0" * 4),
        "damaged",
        "generation is damaged: it is empty or holds only zero bytes; the next start of the run writes it again",
    ),
    "a generation of another program": (
        lambda run: (run / "generation").write_bytes(b"\xff\xfe1\n"),
        "damaged",
        "generation is damaged: it does not hold a start's mark",
    ),
    "a config.yaml of zero bytes": (
        lambda run: (run / "config.yaml").write_bytes(b"\0" * 9),
        "damaged",
        "config.yaml is damaged: it holds only zero bytes",
    ),
    "a config.yaml without steps": (
        lambda run: (run / "config.yaml").write_text("train: {}\n"),
        "damaged",
        "config.yaml is damaged: train.steps is missing in it",
    ),
    "a damaged journal": (damaged_journal, "finished", "metrics.jsonl is damaged in line 3: 7 bytes before its value"),
    "a journal that is a folder": (
        lambda run: ((run / "metrics.jsonl").unlink(), (run / "metrics.jsonl").mkdir()),
        "stopped",
        "Is a directory",
    ),
    "a record of launches that is binary": (
        lambda run: (run / "launches.jsonl").write_bytes(b"\x80\x81\n"),
        "finished",
        "launches.jsonl is damaged in line 1: it is not UTF-8 text",
    ),
    "a cluster.yaml that is empty": (
        lambda run: ((run / "jobs/001").mkdir(parents=True), (run / "jobs/001/cluster.yaml").touch()),
        "damaged",
        "jobs/001/cluster.yaml is damaged: it is empty; restore it, or submit the run again",
    ),
}


@pytest.mark.parametrize(("damage", "state", "problem"), DAMAGE.values(), ids=DAMAGE.keys())
def test_status_shows_a_damaged_run_and_the_other_runs(
    run: Path, damage: Callable[[Path], object], state: str, problem: str, capfd: pytest.CaptureFixture[str]
):
    other = shutil.copytree(run, run.with_name("zebra"))
    damage(run)
    damaged, whole = statuses_of(find_runs([run.parent]))
    assert (Path(damaged.run), damaged.state) == (run, state)
    assert problem in damaged.problems[0], damaged.problems
    assert (Path(whole.run), whole.state, whole.problems) == (other, "finished", [])
    for arguments in ([run.parent], [run.parent, "--json"]):
        app(["status", *map(str, arguments)], standalone_mode=False)
        out = capfd.readouterr().out
        assert problem in out or json.dumps(problem)[1:-1] in out
        assert "zebra" in out


def test_commands_of_many_runs_skip_what_is_no_run_in_a_pattern(run: Path, capfd: pytest.CaptureFixture[str]):
    (run.parent / "books.compare").mkdir()
    (run.parent / "mlflow.db").write_bytes(b"database")
    paths = list(map(str, sorted(run.parent.iterdir())))
    assert len(paths) == 3
    line = f"skipped, because no run is there: {run.parent}/books.compare, {run.parent}/mlflow.db\n"
    for command in (["status"], ["top", "--once"], ["report", "--out", str(run.parent / "report.html")]):
        app([*command, *paths], standalone_mode=False)
        out, errors = capfd.readouterr()
        assert errors.count(line) == 1
        assert run.name in out or command[0] == "report"
    for wrong in ([run, run.parent / "gone"], [run.parent / "books.compare"]):
        with pytest.raises(RunFolderError, match="is not a run and not a folder of runs"):
            find_runs(wrong)


def test_run_locked_by_an_unknown_process_is_shown_as_running(run: Path):
    for content in (b"\0\0\0", b"\xff words\n", b"host not-a-number\n"):
        (run / ".lock").write_bytes(content)
        with (run / ".lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            status = status_of(run)
        assert (status.state, status.process, status.nodes) == ("running", None, "")
    assert status_of(run).state == "finished"


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser can become another user")
def test_status_without_permission_for_a_run_shows_the_other_runs(run: Path):
    shutil.copytree(run, run.with_name("closed")).chmod(0o700)
    shutil.copytree(run, run.with_name("private"))
    (run.with_name("private") / "run.json").chmod(0o600)
    for folder in (*run.parents, run):
        folder.chmod(folder.stat().st_mode | 0o055)
        if folder.name.startswith("pytest-of"):
            break
    os.seteuid(65534)
    try:
        private, whole = statuses_of(find_runs([run.parent]))
    finally:
        os.seteuid(0)
    assert (private.state, whole.state) == ("damaged", "finished")
    path = run.with_name("private") / "run.json"
    assert private.problems == [f"{path} cannot be read: Permission denied; get the right to read it from its owner"]


@contextmanager
def server(accepts: bool) -> Iterator[str]:
    """Yield the URL of a server that accepts connections and never answers, or of no server."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if accepts:
            listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


ASKED_FOR_A_SECOND = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from pretrain.training import run_status

run_status.ANSWER_SECONDS = 1.0
print(json.dumps(asdict(run_status.status_of(Path(sys.argv[1])))))
"""
"""Program that prints the status of a run whose server may take a second. Its process ends the thread that asks."""


@pytest.mark.parametrize("accepts", [False, True])
def test_status_without_the_checkpoint_server_reports_the_problem(run: Path, accepts: bool):
    tree = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(tree.replace("home: null", "home: s3://bucket/folder"))
    with server(accepts) as url:
        access = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        program = [sys.executable, "-c", ASKED_FOR_A_SECOND, str(run)]
        done = subprocess.run(program, env=os.environ | access, check=True, stdout=subprocess.PIPE)
    status = json.loads(done.stdout)
    assert (status["state"], status["checkpoint_step"], status["step"]) == ("finished", None, STEPS)
    [problem] = status["problems"]
    assert problem.startswith("s3://bucket/folder/run does not answer within 1 s")


def test_other_folders_next_to_submissions_are_ignored(tmp_path: Path):
    for name in ("001", "002", "002 (copy)", "10.bak"):
        (tmp_path / "jobs" / name).mkdir(parents=True)
        (tmp_path / "jobs" / name / "cluster.yaml").touch()
    assert last_submission(tmp_path) == tmp_path / "jobs/002"


def test_damaged_heartbeats_are_ignored_and_damaged_plans_refused(tmp_path: Path):
    (tmp_path / "rank-00000.json").write_bytes(b"\0\0")
    assert read_beat(tmp_path, 0) is None
    with pytest.raises(Exception, match=r"plan\.json is missing; submit the run again"):
        LaunchPlan.load(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(Exception, match=r"plan\.json is damaged: entry is missing in it; submit the run again"):
        LaunchPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("ranks", [1, 2])
def test_run_reports_that_its_folder_was_removed_during_training(corpus_folder: Path, tmp_path: Path, ranks: int):
    tree = tree_of(corpus_folder, tmp_path, steps=1_000_000)
    tree["checkpoint"]["every"] = 5
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    training = Start(recipe, ranks, tmp_path / "output")
    run = tmp_path / "run"
    while not any((run / "checkpoints").glob("step-*0")):
        training.wait(0.05)
        assert not any(process.exitcode for process in training.processes), training.output
    run.rename(tmp_path / "moved")
    assert training.finish(grace=5.0)[0] == 1, training.output
    assert (
        f"the run folder {run} was removed or renamed while the run trained in it; nothing more is" in training.output
    )
    assert (
        "Traceback" not in training.output
        and "has taken over" not in training.output
        and "Errno" not in training.output
    )
    assert not run.exists()
