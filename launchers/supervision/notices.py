"""Notices: a command or a web address that gets each event of launches.jsonl that a supervisor records, as JSON.

    supervisor ─▶ queue ─▶ thread ─┬▶ command, on its standard input
                                   └▶ POST to the address

The supervisor never waits for a notice, except for some seconds before it exits. A notice that cannot be delivered is
dropped, and a person is told once. An address may hold a secret, so messages name its host only.
"""

import json
import logging
import os
import queue
import re
import signal
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel, Field

from byteloom.core.faults import FaultClass, class_of
from byteloom.core.retries import RequestError, RetryPolicy, retry
from byteloom.core.validation import Seconds
from launchers.supervision.record import Launch

NOTICE_ATTEMPTS = 4
"""Attempts at one notice."""
NOTICE_SECONDS = 60.0
"""Time after which no attempt at a notice begins."""
NOT_A_COMMAND = (126, 127)
"""Exit codes of the shell for a command that cannot be run."""

log = logging.getLogger(__name__)


class NotifyConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Notices about starts, failures and the end of a submitted run."""

    command: str | None = Field(default=None, min_length=1, examples=["mail -s byteloom me@example.org"])
    """Shell command that gets each event as JSON on its standard input."""
    url: str | None = Field(
        default=None,
        pattern=r"^(https?://[^\s/@]+(/\S*)?|\$\{?[A-Za-z_][A-Za-z0-9_]*\}?)$",
        examples=["https://example.org/hook", "$BYTELOOM_WEBHOOK"],
    )
    """Web address to which each event is sent as JSON, by POST. `$NAME` takes it from an environment variable, which
    keeps a secret address out of the recipe."""
    seconds: Seconds = 10.0
    """Deadline of one attempt. A notice has four."""


class NoticeError(Exception):
    """A notice was not delivered.

    Args:
        fault: class of the fault.
    """

    def __init__(self, text: str, fault: FaultClass) -> None:
        super().__init__(text)
        self.fault = fault


class Notices:
    """Notices of one run.

    Args:
        config: where they go.
        run: the run folder.
        backoff_seconds: longest pause after the first failed attempt.
    """

    def __init__(self, config: NotifyConfig, run: Path, backoff_seconds: float = 2.0) -> None:
        self._run = run
        self._policy = RetryPolicy(NOTICE_ATTEMPTS, backoff_seconds, NOTICE_SECONDS)
        self._ways: dict[str, Callable[[bytes], None]] = {}
        """How to deliver a notice, by the name of the way."""
        if config.command is not None:
            command = config.command
            self._ways["supervise.notify.command"] = lambda body: _call(command, body, config.seconds)
        if config.url is not None:
            url = config.url
            self._ways["supervise.notify.url"] = lambda body: _post(_address(url), body, config.seconds)
        self._failing: set[str] = set()
        """Ways whose last notice was dropped."""
        self._queue: queue.SimpleQueue[Launch | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._deliver_all, name="notices", daemon=True)
        if self._ways:
            self._thread.start()

    def send(self, launch: Launch) -> None:
        """Deliver a notice about an event, later and in a thread."""
        if self._ways:
            self._queue.put(launch)

    def close(self, seconds: float) -> None:
        """Wait until all notices are delivered or dropped, but no longer than some seconds."""
        if self._ways:
            self._queue.put(None)
            self._thread.join(seconds)

    def _deliver_all(self) -> None:
        while (launch := self._queue.get()) is not None:
            body = json.dumps(facts_of(launch, self._run)).encode()
            for name, way in self._ways.items():
                self._deliver(name, way, body)

    def _deliver(self, name: str, way: Callable[[bytes], None], body: bytes) -> None:
        try:
            retry(lambda: way(body), self._policy, name, is_logged=False)
        except RequestError as error:
            if name not in self._failing:
                words = str(error).removeprefix("NoticeError: ")
                log.warning("notices of %s are not delivered, and are dropped until it works: %s", name, words)
            self._failing.add(name)
        else:
            if name in self._failing:
                log.info("notices of %s are delivered again", name)
            self._failing.discard(name)


def facts_of(launch: Launch, run: Path) -> dict[str, object]:
    """Return the facts of a notice. Chat servers show the text."""
    return {"text": f"{run.name}: {launch.summary}", "run": str(run), **asdict(launch)}


def _address(url: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return the web address, from the environment if it is the name of a variable.

    Raises:
        NoticeError: there is no such variable, or it holds no web address.
    """
    if not url.startswith("$"):
        return url
    name = url.strip("${}")
    found = environment.get(name, "").strip()
    if not re.match(r"https?://[^\s/]", found):
        what = "holds no web address" if found else "is not set in the job"
        raise NoticeError(f"the environment variable {name} {what}", FaultClass.FORBIDDEN)
    return found


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refusal of redirections: they would turn a POST into a GET, or pass the facts to another server."""

    def redirect_request(self, *_: object) -> None:
        """Follow no redirection; the answer then counts as an error."""


def _post(url: str, body: bytes, seconds: float) -> None:
    """Send a POST request.

    Raises:
        NoticeError: the server did not accept it in time. The message has no other part of the address than the host.
    """
    host = urlsplit(url).hostname
    headers = {"Content-Type": "application/json", "User-Agent": "byteloom"}
    answer: Future[None] = Future()

    def send() -> None:
        try:
            request = urllib.request.Request(url, body, headers, method="POST")
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=seconds):
                answer.set_result(None)
        except Exception as error:  # raised again where the result is wanted
            answer.set_exception(error)

    # A daemon: the timeout of `open` holds for each piece of an answer, and not for the search for the host.
    threading.Thread(target=send, name="notice", daemon=True).start()
    try:
        answer.result(seconds)
    except urllib.error.HTTPError as error:
        fault = class_of(error) if error.code >= 400 else FaultClass.FORBIDDEN
        raise NoticeError(f"{host} answers with status {error.code}", fault) from error
    except TimeoutError as error:
        raise NoticeError(f"{host} does not answer within {seconds:.0f} s", FaultClass.PASSING) from error
    except Exception as error:  # http.client has errors of its own, which quote the address
        why = error.reason if isinstance(error, urllib.error.URLError) else type(error).__name__
        raise NoticeError(f"{host} cannot be reached: {why}", FaultClass.PASSING) from error


def _call(command: str, body: bytes, seconds: float) -> None:
    """Run a shell command with a notice on its standard input.

    Raises:
        NoticeError: it failed, or did not end in time and was killed with its children.
    """
    with subprocess.Popen(
        command,
        shell=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            process.communicate(body + b"\n", timeout=seconds)
        except subprocess.TimeoutExpired as error:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise NoticeError(f"the command took more than {seconds:.0f} s", FaultClass.PASSING) from error
    if process.returncode:
        fault = FaultClass.FORBIDDEN if process.returncode in NOT_A_COMMAND else FaultClass.PASSING
        raise NoticeError(f"the command ended with exit code {process.returncode}", fault)
