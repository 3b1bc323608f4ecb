"""The one way to repeat a request that failed.

    retry(request, policy) ─▶ answer
                           └▶ RequestError: the class of the fault, and how many attempts were made

Corpora at URLs and in folders, sources of `prepare`, checkpoints at URLs, and the tracker share it.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_any,
    stop_before_delay,
    wait_exponential,
)

from byteloom.core.faults import FaultClass, class_of, in_words, is_missing, is_refused, retry_after

log = logging.getLogger(__name__)

MAX_PAUSE = 30.0
"""Longest pause between two attempts, in seconds."""
QUIET_ATTEMPTS = 3
"""Number of the first failed attempt that is logged."""

T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """Limits of the attempts at a request."""

    attempts: int
    """Largest number of attempts."""
    backoff_seconds: float
    """Longest pause after the first failed attempt. It doubles with each attempt, up to `longest_pause`."""
    deadline_seconds: float
    """Time after which no attempt begins."""
    longest_pause: float = MAX_PAUSE
    """Longest pause between two attempts, in seconds."""


class RequestError(Exception):
    """A request failed and is not repeated. The cause is the last attempt's error."""

    def __init__(self, fault: FaultClass, text: str, error: BaseException) -> None:
        super().__init__(text)
        self.fault = fault
        self.is_missing = is_missing(error)
        self.is_refused = is_refused(error)


class RequestStoppedError(Exception):
    """The owner of a request stopped it."""


def retry(
    request: Callable[[], T],
    policy: RetryPolicy,
    what: str,
    *,
    is_known: bool = False,
    stopped: threading.Event | None = None,
    before_retry: Callable[[BaseException], None] = lambda error: None,
    final: tuple[type[Exception], ...] = (),
    is_logged: bool = True,
) -> T:
    """Return the answer to a request. Repeat the request while its fault is passing.

    Args:
        request: makes one attempt.
        policy: how often and how long.
        what: name of the file or server, for the log.
        is_known: see `class_of`.
        stopped: ends a pause, and allows no further attempt, once it is set.
        before_retry: called after each failed attempt that is followed by another.
        final: kinds of errors that the request raises itself; they are not repeated, and raised unchanged.
        is_logged: log failed attempts from the third on. Otherwise `before_retry` does.

    Raises:
        RequestError: the last attempt failed, or a retry cannot help.
        RequestStoppedError: `stopped` was set.
        Exception: one of `final`, or an error of the program, unchanged.
    """
    begin = time.monotonic()
    failed = list[Exception]()
    try:
        if stopped is not None and stopped.is_set():
            raise RequestStoppedError
        return request()  # without tenacity, which takes as long as a read of 100 KiB
    except Exception as error:
        failed.append(error)
    stopped = stopped or threading.Event()
    unrepeated: tuple[type[Exception], ...] = (RequestStoppedError, *final)

    def attempt() -> T:
        if failed:
            raise failed.pop()
        if stopped.is_set():
            raise RequestStoppedError
        return request()

    def pause(seconds: float) -> None:
        stopped.wait(seconds)

    def prepare_next(state: RetryCallState) -> None:
        error = _error(state)
        if is_logged and state.attempt_number >= QUIET_ATTEMPTS:
            log.warning("%s: %s; attempt %d of %d failed", what, in_words(error), state.attempt_number, policy.attempts)
        before_retry(error)

    deadline_seconds = policy.deadline_seconds - (time.monotonic() - begin)
    retrying = Retrying(
        stop=stop_any(stop_after_attempt(policy.attempts), stop_before_delay(deadline_seconds)),
        wait=lambda state: _pause(state, policy),
        retry=retry_if_exception(
            lambda error: not isinstance(error, unrepeated) and class_of(error, is_known) is FaultClass.PASSING
        ),
        sleep=pause,
        before_sleep=prepare_next,
        reraise=True,
    )
    try:
        return retrying(attempt)
    except unrepeated:
        raise
    except Exception as error:
        fault = class_of(error, is_known)
        if fault is FaultClass.OWN:
            raise
        times = f" (attempt {retrying.statistics['attempt_number']} of {policy.attempts})"
        text = in_words(error) + (times if fault is FaultClass.PASSING else "")
        raise RequestError(fault, text, error) from error


_random = random.Random()  # its own: a pause must not advance a seeded generator


def _pause(state: RetryCallState, policy: RetryPolicy) -> float:
    """Return the seconds to wait after a failed attempt: drawn evenly, and at least what the server asks for."""
    longest = policy.longest_pause
    drawn = _random.uniform(0, wait_exponential(policy.backoff_seconds, max=longest)(state))
    return min(longest, max(drawn, retry_after(_error(state))))


def _error(state: RetryCallState) -> BaseException:
    """Return the error of a failed attempt."""
    error = state.outcome.exception() if state.outcome is not None else None
    assert error is not None, "only failed attempts are followed by a pause"
    return error
