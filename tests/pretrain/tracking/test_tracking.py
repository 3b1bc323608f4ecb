"""Delivery to MLflow: the content of a run's page, and the faults of stores and servers."""

import logging
import re
import shlex
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click.testing
import pytest
from typer.testing import CliRunner

from byteloom.core.retries import RetryPolicy
from launchers.supervision.heartbeat import FOLDER as HEARTBEATS
from launchers.supervision.record import LaunchRecord, reason_of_start
from pretrain.cli.app import app
from pretrain.tracking import (
    Delivery,
    Journal,
    MlflowShipper,
    ParentRun,
    RunDescription,
    TrackingConfig,
    TrackingError,
    deliver_all,
    fault_of,
    open_recorder,
    outbox,
    shown,
)
from tests.mlflow_server import Server, client_of, make_store, misbehaving

PARAMS = {"train.steps": 4, "optimizer.learning_rate": 0.003}


class TrackedRun:
    """Run folder with invented metrics; the journal, the delivery and MLflow are real."""

    def __init__(self, path: Path, uri: str | None) -> None:
        path.mkdir(parents=True)
        self.path = path
        self.identity = uuid.uuid4().hex
        self.config = TrackingConfig(uri=uri)
        self.uri = self.config.store(path.parent)
        (path / "train.log").touch()
        self.starts = 0

    def train(
        self,
        first: int,
        last: int,
        params: Mapping[str, Any] = PARAMS,
        reason: str = "manual",
        status: str = "FINISHED",
    ) -> None:
        """Start the run and log some steps."""
        self.starts += 1
        (self.path / "config.yaml").write_text(f"{dict(params)}\n")
        journal = Journal(self.path / "metrics.jsonl", first - 1 if first > 1 else None)
        after = first - 1 if first > 1 else -1
        description = RunDescription(
            self.path.name, self.identity, params, {"host": "here"}, after, self.starts, reason, self.path
        )
        recorder = open_recorder(self.config, journal, description)
        for step in range(first, last + 1):
            recorder.log(step, {"train/bits_per_byte": 8 / step})
        recorder.close(status)

    def shipper(self) -> MlflowShipper:
        return MlflowShipper(self.path)

    @property
    def client(self) -> Any:
        return client_of(self.uri)

    @property
    def run(self) -> Any:
        return self.client.get_run(self.shipper().delivery.run_id)

    def steps(self) -> list[int]:
        history = self.client.get_metric_history(self.run.info.run_id, "train/bits_per_byte")
        return sorted(metric.step for metric in history)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(params=["embedded", "server"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> TrackedRun:
    """Run in a folder with a name that a URL would quote, for the embedded store and for a server."""
    uri = request.getfixturevalue("server").uri if request.param == "server" else None
    root = tmp_path / "my runs #1"
    if uri is None:
        make_store(root / "mlflow.db")
    return TrackedRun(root / request.node.name.partition("[")[0], uri)


@pytest.mark.slow
def test_report_is_an_artifact_of_its_last_state(folder: TrackedRun, tmp_path: Path):
    report, shipper = folder.path / "report.html", folder.shipper
    folder.train(1, 2)
    assert "report.html" not in {file.path for file in folder.client.list_artifacts(folder.run.info.run_id)}
    for text in ("first", "second"):
        report.write_text(text)
        shipper().deliver()
        path = folder.client.download_artifacts(folder.run.info.run_id, "report.html", str(tmp_path))
        assert Path(path).read_text() == text


@pytest.mark.slow
def test_starts_changed_parameters_and_files_are_shown(
    folder: TrackedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    folder.train(1, 4)
    first = folder.run
    assert "mlflow.note.content" not in first.data.tags
    [output] = first.outputs.model_outputs  # MLflow's page lists a run without a model among evaluations of GenAI
    assert folder.client.get_logged_model(output.model_id).status == "READY"
    experiment = folder.client.get_experiment(first.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"

    (folder.path / "train.log").write_text("".join(f"line {number}\n" for number in range(100_000)))
    changed = {**PARAMS, "train.steps": 8, "optimizer.learning_rate": 0.001}
    folder.train(5, 8, changed, reason="requeued: lost n2")
    run = folder.run
    assert run.info.run_id == first.info.run_id
    assert run.data.params == {
        "train.steps": "4",
        "optimizer.learning_rate": "0.003",
    }  # MLflow never changes a parameter
    assert run.data.tags["now.train.steps"] == "8"
    assert run.data.tags["now.optimizer.learning_rate"] == "0.001"
    assert run.data.tags["start.1"].startswith("from the beginning: manual (20")
    assert run.data.tags["start.2"].startswith("after step 4: requeued: lost n2 (20")
    assert run.data.tags["start.2.changes"] == "train.steps: 4 -> 8; optimizer.learning_rate: 0.003 -> 0.001"
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith("Start 2 continues after step 4: requeued: lost n2 (20")
    assert "`optimizer.learning_rate` 0.001 (at first 0.003)" in note
    starts = folder.client.get_metric_history(run.info.run_id, "starts")
    assert [(metric.step, metric.value) for metric in starts] == [(0, 1), (4, 2)]
    assert folder.steps() == list(range(1, 9))

    read = {}
    for name in ("config.yaml", "train.log"):
        read[name] = Path(folder.client.download_artifacts(run.info.run_id, name, str(elsewhere))).read_text()
    assert read["config.yaml"] == f"{changed}\n"
    end = read["train.log"]
    assert 199_000 < len(end) <= 200_000
    assert end.startswith("line ")
    assert end.endswith("line 99999\n")
    assert {path.name for path in elsewhere.iterdir()} == {"config.yaml", "train.log"}  # no mlruns

    # A person's choices stay. A parameter with its first value again is shown with that value.
    folder.client.set_tag(run.info.run_id, "mlflow.note.content", "mine")
    folder.client.set_experiment_tag(run.info.experiment_id, "mlflow.experimentKind", "genai_development")
    folder.train(9, 9, {**changed, "optimizer.learning_rate": 0.003})
    run = folder.run
    assert run.data.tags["mlflow.note.content"] == "mine"
    assert run.data.tags["now.optimizer.learning_rate"] == "0.003"
    experiment = folder.client.get_experiment(run.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "genai_development"
    folder.client.set_experiment_tag(run.info.experiment_id, "mlflow.experimentKind", "custom_model_development")


@pytest.mark.slow
def test_starts_and_files_missed_by_a_dead_server_are_delivered_later(server: Server, tmp_path: Path):
    folder = TrackedRun(tmp_path / "runs/missed", "http://127.0.0.1:9")
    folder.train(1, 4, status="KILLED")
    folder.train(3, 6, reason="requeued: preempted")
    state = folder.path / "mlflow.json"
    state.write_text(state.read_text().replace("http://127.0.0.1:9", server.uri))  # the server moved
    folder.uri = server.uri
    (folder.path / "train.log").write_text("what was logged\n")
    done = CliRunner().invoke(app, ["track", str(folder.path)])
    assert done.exit_code == 0, done.output
    run = folder.run
    assert folder.steps() == list(range(1, 7))
    assert run.data.tags["start.2"].startswith("after step 2: requeued: preempted (")
    assert {file.path for file in folder.client.list_artifacts(run.info.run_id)} == {"config.yaml", "train.log"}


FAULTS = {
    "refused": "connection refused",
    "hangs": "timed out",
    "closes": "the server closed the connection",
    "401": "HTTP 401",
    "404": "HTTP 404",
    "500": "HTTP 500",
    "html": "something answers there, but it is not MLflow",
    "json": "something answers there, but it is not MLflow",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_failing_server_gives_a_short_warning(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1" if fault == "hangs" else "60")
    with misbehaving(fault) as address:
        uri = "http://127.0.0.1:9" if fault == "refused" else address.replace("://", "://user:secret@")
        folder = TrackedRun(tmp_path / "runs/run", uri)
        with caplog.at_level(logging.WARNING, "pretrain"):
            folder.train(1, 3)
    journal = folder.path / "metrics.jsonl"
    assert [record.getMessage() for record in caplog.records] == [
        f"MLflow at {shown(uri)}: {FAULTS[fault]}. Training continues; the numbers are safe in {journal}",
        f"3 steps did not reach MLflow at {shown(uri)}; they are safe in {journal}, and "
        f"`byteloom track {folder.path}` sends them",
    ]
    assert "secret" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "attempts"), [("503", 4), ("401", 1), ("404", 1)])
def test_delivery_is_repeated_only_while_its_fault_may_pass(
    fault: str, attempts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A final delivery makes at most four attempts, and one if a person must change something first."""
    monkeypatch.setattr(outbox, "FINAL_POLICY", RetryPolicy(4, 0.0, 30.0))
    requests = list[str]()
    with misbehaving(fault, requests) as uri:
        delivery = Delivery(uri, identity="run", status="FINISHED")
        delivery.save(tmp_path / "mlflow.json")
        shipper = MlflowShipper(tmp_path)
        with pytest.raises(Exception, match=fault):
            deliver_all(shipper)
    assert len(requests) == attempts


def test_faults_of_a_store_are_described_in_a_few_words(tmp_path: Path):
    (tmp_path / "mlflow.db").write_bytes(b"not a database" * 100)

    def fault(**fields: str) -> str:
        config = TrackingConfig.model_validate(fields)
        with pytest.raises(Exception) as caught:
            ParentRun(config, tmp_path, "sweep", "identity", 1, {})
        return fault_of(caught.value)

    assert fault() == "file is not a database"
    assert fault(uri=f"sqlite:///{tmp_path}/missing/mlflow.db") == "No such file or directory"
    assert fault(uri="https://no-such-host.invalid:5000") == "no such host"
    assert len(fault_of(ValueError("x" * 300))) == 100
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first  # an error that is raised again may lead to itself
    assert fault_of(first) == "first"


def advice(folder: TrackedRun) -> str:
    """Return the message for a run or experiment that was deleted."""
    with pytest.raises(TrackingError) as caught:
        folder.shipper().finish()
    return str(caught.value)


def follow(text: str) -> None:
    """Run the first command in a message."""
    command = re.search("`(.*?)`", text)
    assert command is not None
    setting, program, *arguments = shlex.split(command[1])
    assert program == "mlflow"
    mlflow(arguments, dict([setting.split("=", 1)]))


def mlflow(arguments: list[str], environment: Mapping[str, str]) -> None:
    from mlflow.cli import cli  # noqa: PLC0415 it takes seconds

    done = click.testing.CliRunner().invoke(cli, arguments, env=environment)
    assert done.exit_code == 0, f"{done.output}\n{done.exception}"


@pytest.mark.slow
def test_deleted_run_or_experiment_is_restored_as_the_message_says(server: Server, tmp_path: Path):
    folder = TrackedRun(tmp_path / "runs/deleted", server.uri)
    folder.config = TrackingConfig(uri=server.uri, experiment="to be deleted")
    folder.train(1, 3)
    run = folder.run
    folder.client.delete_run(run.info.run_id)
    message = advice(folder)
    assert message.startswith(
        f"run {run.info.run_id} was deleted; `MLFLOW_TRACKING_URI={server.uri} mlflow runs restore"
    )
    assert message.endswith(f"`byteloom track {folder.path} --new-run` sends everything to a new one")
    follow(message)
    folder.train(4, 5)
    assert folder.steps() == [1, 2, 3, 4, 5]

    folder.client.delete_experiment(run.info.experiment_id)
    message = advice(folder)
    assert message.startswith("experiment to be deleted was deleted; `MLFLOW_TRACKING_URI=")
    other = TrackedRun(tmp_path / "runs/other", server.uri)
    other.config = folder.config
    other.train(1, 2)
    with pytest.raises(TrackingError, match=r"^experiment to be deleted was deleted; .* another tracking.experiment$"):
        other.shipper().finish()
    other.config = TrackingConfig(uri=server.uri, experiment="another")
    other.train(3, 3)
    assert other.steps() == [1, 2, 3]
    other.config = folder.config
    follow(message)
    folder.train(6, 6)
    other.train(4, 4)
    assert folder.steps() == [1, 2, 3, 4, 5, 6]
    assert other.steps() == [1, 2, 3, 4]


@pytest.mark.slow
def test_run_deleted_during_training_is_named(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = TrackedRun(tmp_path / "runs/meanwhile", server.uri)
    folder.train(1, 2)
    shipper = folder.shipper()
    shipper.deliver()
    run_id = folder.run.info.run_id
    folder.client.delete_run(run_id)
    with (folder.path / "metrics.jsonl").open("a") as journal:
        journal.write('{"step": 3, "time": 1, "train/bits_per_byte": 2}\n')
    for _ in range(2):
        with pytest.raises(TrackingError, match=f"^run {run_id} was deleted; .* mlflow runs restore"):
            shipper.deliver()
    folder.client.restore_run(run_id)
    assert shipper.deliver() == 1


@pytest.mark.slow
def test_permanently_deleted_run_is_delivered_to_a_new_run(tmp_path: Path):
    folder = TrackedRun(tmp_path / "runs/gone", None)
    folder.train(1, 3)
    deleted = folder.run.info.run_id
    folder.client.delete_run(deleted)
    mlflow(["gc", "--backend-store-uri", folder.uri, "--run-ids", deleted], {"MLFLOW_TRACKING_URI": folder.uri})
    assert advice(folder).startswith(f"run {deleted} is no longer there. When the run has ended, `byteloom track")
    done = CliRunner().invoke(app, ["track", "--new-run", str(folder.path)])
    assert done.exit_code == 0, done.output
    assert folder.run.info.run_id != deleted
    assert folder.steps() == [1, 2, 3]
    assert "start.1" in folder.run.data.tags


def test_start_records_its_known_reason(tmp_path: Path):
    assert reason_of_start(tmp_path, {}) == "manual"
    slurm = {"SLURM_RESTART_COUNT": "2", "SLURM_JOB_ID": "4711"}
    assert reason_of_start(tmp_path, slurm) == "Slurm requeued job 4711 (restart 2)"
    assert reason_of_start(tmp_path, {"TORCHELASTIC_RESTART_COUNT": "1"}) == "torchrun restarted the ranks (restart 1)"

    supervised = {HEARTBEATS: "heartbeats"} | slurm
    record = LaunchRecord(tmp_path)
    assert reason_of_start(tmp_path, supervised) == "submitted"
    record.append("submitted", "4711")
    record.append("started", "4711")
    assert reason_of_start(tmp_path, supervised) == "submitted"
    record.append("failed", "4711", reason="rank 2 on n2 was killed by SIGKILL")
    record.append("started", "4711", restart=1)
    assert reason_of_start(tmp_path, supervised) == "failed: rank 2 on n2 was killed by SIGKILL"
    assert reason_of_start(tmp_path, {}) == "manual"
