"""Notices of a supervised run, to a real HTTP server and to real commands; and its slow ranks."""

import json
import os
import platform
import signal
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from launchers.supervision.notices import Notices, NotifyConfig
from launchers.supervision.plan import SuperviseConfig
from launchers.supervision.record import Launch, LaunchRecord
from pretrain.cli.runs.status import status_remark
from pretrain.training.run_status import status_of
from tests.launchers.test_supervise import _put_tests_on_python_path, submission, wait_for  # noqa: F401 a fixture
from tests.slurm.cluster import wait_until

SECRET = "T0K3N"
LAUNCH = Launch(1781000000.0, "failed", "4711", 1, ["n1", "n2"], 40, "rank 2 on n2: Killed", "n2", "node")


class Webhook:
    """HTTP server that gets notices. Each of the first answers is a status, or "stall" for none."""

    def __init__(self, answers: Sequence[int | str] = ()) -> None:
        self.got = list[dict[str, Any]]()
        self.requests = 0
        self._answers = list(answers)
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/{SECRET}?key={SECRET}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.headers["Content-Type"] == "application/json"
                outer.requests += 1
                answer = outer._answers.pop(0) if outer._answers else 200
                if answer == "stall":
                    outer.closing.wait(30)
                    return
                if answer == 200:
                    outer.got.append(json.loads(body))
                self.send_response(int(answer))
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def webhooks() -> Iterator[list[Webhook]]:
    made = list[Webhook]()
    yield made
    for webhook in made:
        webhook.close()


def send(config: NotifyConfig, *launches: Launch, run: Path = Path("runs/books")) -> None:
    notices = Notices(config, run, backoff_seconds=0.01)
    for launch in launches:
        notices.send(launch)
    notices.close(20)


def test_command_and_address_get_the_facts_as_json(tmp_path: Path, webhooks: list[Webhook]):
    webhooks.append(webhook := Webhook())
    send(NotifyConfig(command=f"cat >> '{tmp_path}/facts'", url=webhook.url), LAUNCH)
    facts = {
        "text": "books: failed: rank 2 on n2: Killed", "run": "runs/books", "time": 1781000000.0, "event": "failed",
        "job": "4711", "restart": 1, "nodes": ["n1", "n2"], "step": 40, "reason": "rank 2 on n2: Killed",
        "faulty": "n2", "fault": "node",
    }  # fmt: skip
    assert webhook.got == [facts]
    assert (tmp_path / "facts").read_text() == json.dumps(facts) + "\n"


def test_server_that_is_busy_or_stalls_gets_the_notice_again(webhooks: list[Webhook], caplog: pytest.LogCaptureFixture):
    webhooks.append(webhook := Webhook([503, "stall", 429]))
    send(NotifyConfig(url=webhook.url, seconds=2), LAUNCH)
    assert (webhook.requests, len(webhook.got)) == (4, 1)
    assert caplog.text == ""


@pytest.mark.parametrize(("answers", "requests"), [([404] * 3, 3), ([307] * 3, 3), ([302] * 3, 3), ([500] * 12, 12)])
def test_failure_is_logged_once_without_the_secret_and_a_refusal_is_final(
    answers: list[int | str], requests: int, webhooks: list[Webhook], caplog: pytest.LogCaptureFixture
):
    webhooks.append(webhook := Webhook(answers))
    with caplog.at_level("DEBUG"):
        send(NotifyConfig(url=webhook.url), LAUNCH, LAUNCH, LAUNCH, LAUNCH)
    assert (webhook.requests, len(webhook.got)) == (requests + 1, 1)
    failed, works = [record.message for record in caplog.records]
    assert failed.startswith("notices of supervise.notify.url are not delivered, and are dropped until it works: 127.0")
    assert f"answers with status {answers[0]}" in failed and works.endswith("are delivered again")
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("url", "why"),
    [
        (f"http://127.0.0.1:1/{SECRET}", "127.0.0.1 cannot be reached"),
        ("$WITH_PASSWORD", "127.0.0.1 cannot be reached"),
        (f"http://127.0.0.1/{SECRET}\x7f", "127.0.0.1 cannot be reached: InvalidURL"),
        ("$NO_SUCH_VARIABLE", "the environment variable NO_SUCH_VARIABLE is not set in the job"),
        ("${OTHER_VARIABLE}", "the environment variable OTHER_VARIABLE holds no web address"),
    ],
)
def test_wrong_address_is_logged_without_the_secret(
    url: str, why: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OTHER_VARIABLE", SECRET)
    monkeypatch.setenv("WITH_PASSWORD", f"http://user:{SECRET}@127.0.0.1/{SECRET}")
    send(NotifyConfig(url=url), LAUNCH, LAUNCH)
    (message,) = [record.message for record in caplog.records]
    assert why in message and SECRET not in caplog.text


def test_address_of_an_environment_variable(webhooks: list[Webhook], monkeypatch: pytest.MonkeyPatch):
    webhooks.append(webhook := Webhook())
    monkeypatch.setenv("BYTELOOM_WEBHOOK", f"{webhook.url}\n")
    send(NotifyConfig(url="$BYTELOOM_WEBHOOK"), LAUNCH)
    assert len(webhook.got) == 1


@pytest.mark.parametrize(
    "url", ["hooks.example.org/x", "ftp://example.org", "file:///x", "$", "http://", "http://u:p@x/"]
)
def test_what_is_no_web_address_is_refused(url: str):
    with pytest.raises(ValidationError):
        NotifyConfig(url=url)


def test_command_that_fails_is_repeated_and_one_that_hangs_is_killed_with_its_children(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    tries = tmp_path / "tries"
    send(NotifyConfig(command=f"echo >> '{tries}'; test $(wc -l < '{tries}') -ge 3"), LAUNCH)
    assert tries.read_text() == "\n" * 3 and caplog.text == ""
    send(NotifyConfig(command="no-such-command-at-all"), LAUNCH, LAUNCH)
    assert [record.message.partition("works: ")[2] for record in caplog.records] == [
        "the command ended with exit code 127"
    ]
    (tmp_path / "children").touch()
    for seconds in (0.4, 4.0):  # on a busy machine, an attempt may end before its shell has started
        send(NotifyConfig(command=f"sleep 600 & echo $! >> '{tmp_path}/children'; wait", seconds=seconds), LAUNCH)
        assert f"the command took more than {seconds:.0f} s (attempt 4 of 4)" in caplog.text
        if children := (tmp_path / "children").read_text().split():
            break
    assert 1 <= len(children) <= 4
    wait_until(lambda: not any(_lives(int(child)) for child in children), "all are killed", 10)


def _lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_closing_waits_no_longer_than_it_is_told_to(webhooks: list[Webhook]):
    webhooks.append(webhook := Webhook(["stall"]))
    notices = Notices(NotifyConfig(url=webhook.url, seconds=600), Path("runs/books"))
    notices.send(LAUNCH)
    wait_until(lambda: webhook.requests == 1, "a notice is under way", 10)
    notices.close(0.1)
    assert webhook.got == []


def test_each_event_of_a_run_is_sent_and_slow_ranks_are_among_them(tmp_path: Path, webhooks: list[Webhook]):
    webhooks.append(webhook := Webhook())
    run = tmp_path / "run"
    limits = SuperviseConfig(start_seconds=30, notify=NotifyConfig(url=webhook.url), exclude_slow=True)
    starts = [{"does": "fail", "rank": 1, "slow": 0, "checkpoint": 1}, {"does": "work", "slow": 1}]
    submission(run, starts, limits).submit()
    wait_until(lambda: [each["event"] for each in webhook.got].count("slow") == 2, "both are slow", 60)
    clauses = [f"rank {rank} on {platform.node()} is 30 % slower than the median" for rank in (0, 1)]
    assert clauses[1] in status_remark(status_of(run)) and clauses[0] not in status_remark(status_of(run))
    (run / "done").touch()
    wait_for(run, "finished")
    wait_until(lambda: webhook.got[-1]["event"] == "finished", "the last notice", 10)
    launches = LaunchRecord(run).read()
    assert [launch.event for launch in launches] == [  # there is no other node, so none is excluded
        "submitted", "started", "slow", "failed", "started", "slow", "finished",
    ]  # fmt: skip
    assert [(launch.reason, launch.faulty) for launch in launches if launch.event == "slow"] == [
        (clause, platform.node()) for clause in clauses
    ]
    assert [(each["event"], each["time"]) for each in webhook.got] == [
        (launch.event, launch.time) for launch in launches[1:]
    ]
    assert status_of(run).slow_ranks == []
    assert SECRET not in "".join(path.read_text() for path in (run / "jobs/001/submitit").glob("*log*"))


def test_run_with_a_dead_server_ends_as_without_one(tmp_path: Path, webhooks: list[Webhook]):
    webhooks.append(webhook := Webhook([404] * 9))
    run = tmp_path / "run"
    limits = SuperviseConfig(start_seconds=30, notify=NotifyConfig(url=webhook.url))
    job = int(submission(run, [{"does": "work"}], limits).submit())
    wait_for(run, "started")
    os.kill(job, signal.SIGTERM)
    wait_for(run, "stopped")
    _, code = os.waitpid(job, 0)
    assert code == 0
    log = next((run / "jobs/001/submitit").glob("*_log.err")).read_text()
    assert log.count("are not delivered") == 1 and SECRET not in log
