"""The one way to call Slurm's commands.

    ask(command) ─▶ exit code and output
                 └▶ SchedulerError: there is no such command, or Slurm did not answer until the deadline

slurmctld restarts, is busy, or is behind a slow network for a while. The call is then repeated with growing pauses. The
last words of the command are kept. An answer about the request itself, such as "Invalid job id specified", is final.

Variables of the submitting shell change what the commands do and print, such as SQUEUE_FORMAT and SLURM_CLUSTERS. Calls
get none of them; see environment.py.
"""

import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from byteloom.core.errors import CorrectableError
from byteloom.core.retries import RequestError, RetryPolicy, retry
from launchers.environment import clean_environment
from launchers.slurm.presets import ClusterError

T = TypeVar("T")

IN_JOB = RetryPolicy(attempts=1000, backoff_seconds=1.0, deadline_seconds=600.0, longest_pause=5.0)
"""Limits of a call by a job that depends on the answer: slurmctld may be down for minutes."""
FOR_PERSON = RetryPolicy(attempts=5, backoff_seconds=1.0, deadline_seconds=30.0)
"""Limits of a call that a person waits for."""
ONCE = RetryPolicy(attempts=1, backoff_seconds=0.0, deadline_seconds=1.0)
"""Limits of a call that its caller repeats."""
CALL_SECONDS = 60.0
"""Time that one call may take."""

PASSING = re.compile(
    r"Socket timed out|Unable to contact slurm controller|Communication connection failure|Connection (refused|reset)"
    r"|Connection timed out|Transport endpoint|Zero Bytes were transmitted|Message (receive|send) failure"
    r"|Resource temporarily unavailable|temporarily unable|backup controller in standby|Slurmctld is in standby"
    r"|Unable to establish control machine address|[Pp]rotocol authentication error|[Mm]unge|Invalid authentication"
    r"|slurm_persist_conn_open|Failure sending message to controller|Job/step already completing|Header lengths",
)
"""Errors of Slurm that pass."""
ANY_WORDS = re.compile("")
"""All errors. A job repeats whatever it cannot do without: a slurmctld that has just restarted calls it invalid."""


class SchedulerError(CorrectableError):
    """Slurm is not installed, does not answer, or refuses."""


class PassingError(Exception):
    """A call failed, and may succeed later."""


def ask(
    *command: str,
    policy: RetryPolicy = FOR_PERSON,
    text: str | None = None,
    seconds: float = CALL_SECONDS,
    environment: Mapping[str, str] | None = None,
    passing: Sequence[re.Pattern[str]] = (PASSING,),
    answer: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Call a command of Slurm until it answers; return its exit code and output.

    Args:
        command: the command and its arguments.
        policy: how often and how long.
        text: standard input.
        seconds: time that one call may take.
        environment: of the command; by default that of `clean_environment`.
        passing: patterns of errors that pass.
        answer: text in the output of a command that has answered, even if it fails.

    Raises:
        SchedulerError: there is no such command, or the last attempt failed; the message has its last words.
    """
    environment = clean_environment() if environment is None else environment

    def attempt() -> subprocess.CompletedProcess[str]:
        try:
            done = subprocess.run(
                command, input=text, env=environment, capture_output=True, text=True, timeout=seconds, check=False
            )
        except FileNotFoundError as error:
            raise SchedulerError(
                f"this machine has no {command[0]}: Slurm is not installed, or its environment module is not loaded"
            ) from error
        except OSError as error:  # no memory for a process, or the file system of the command
            raise PassingError(f"{command[0]} cannot be started: {error}") from error
        except subprocess.TimeoutExpired as error:
            raise PassingError(f"{command[0]} took more than {error.timeout:.0f} s") from error
        has_answered = done.returncode == 0 or (answer is not None and answer in done.stdout)
        if not has_answered and any(pattern.search(done.stderr) for pattern in passing):
            raise PassingError(last_line(done.stderr))
        return done

    return repeated(attempt, policy, " ".join(command[:3]))


def repeated(
    attempt: Callable[[], T],
    policy: RetryPolicy,
    what: str,
    *,
    before_retry: Callable[[BaseException], None] = lambda error: None,
) -> T:
    """Return the result of an attempt. Repeat the attempt while it raises PassingError.

    Args:
        attempt: makes a call.
        policy: how often and how long.
        what: name of the call, for the log.
        before_retry: called with the error before each repetition.

    Raises:
        SchedulerError: the last attempt failed; the message has its last words.
    """
    try:
        return retry(attempt, policy, what, final=(SchedulerError, ClusterError), before_retry=before_retry)
    except RequestError as error:
        words = str(error).removeprefix("PassingError: ").removesuffix(" (attempt 1 of 1)")
        raise SchedulerError(f"Slurm does not answer: {words}") from error


def is_passing(text: str) -> bool:
    """Return whether the errors that a command printed may pass."""
    return PASSING.search(text) is not None


def look(*command: str) -> str:
    """Return the output of a command that only explains; empty if Slurm does not answer."""
    try:
        return ask(*command).stdout
    except SchedulerError:
        return ""


def step_environment() -> dict[str, str]:
    """Return the environment of `srun` in a job: the job's, without what the submitting shell may have set."""
    unwanted = ("SLURM_EXPORT_ENV", "SLURM_CPU_BIND", "SLURM_MEM_BIND", "SLURM_CLUSTERS", "SRUN_")
    return {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}


def last_line(text: str) -> str:
    """Return the last line of an error of a Slurm command, without the command's name."""
    lines = text.strip().splitlines() or ["no reason is given"]
    return re.sub(r"^\w+: (error|fatal): ", "", lines[-1])
