"""Classes of the failures of disks, networks and servers.

    exception ─▶ class_of ─▶ PASSING      retry with backoff until a deadline     byteloom.core.retries
                             FORBIDDEN    tell the user at once
                             DAMAGED      quarantine, count against a budget
                             OWN          raise unchanged; the command writes a crash file

fsspec's libraries have errors of their own. They are recognized by HTTP status, by the service's code and by errno, so
no library is imported here.
"""

import errno
import re
import ssl
from collections.abc import Iterator
from enum import StrEnum


class FaultClass(StrEnum):
    """Class of a failure, which decides who handles it."""

    PASSING = "passing"
    """The same request may succeed later."""
    FORBIDDEN = "forbidden"
    """The request cannot succeed until a person changes something."""
    DAMAGED = "damaged"
    """The bytes are lost or wrong."""
    OWN = "own fault"
    """An error of the program."""


CONNECTION_ERRNOS = frozenset(
    getattr(errno, name)
    for name in (
        *("ETIMEDOUT", "ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "ENOTCONN", "ESHUTDOWN", "ENETDOWN"),
        *("ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH", "EREMOTEIO"),
    )
)
"""Errors of a connection."""
PASSING_ERRNOS = CONNECTION_ERRNOS | frozenset(
    getattr(errno, name)
    for name in ("ESTALE", "EAGAIN", "EINTR", "EBUSY", "EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "ENOLCK", "EPIPE")
)
"""Errors of a network file system, of a connection, or of a busy machine."""
STORAGE_EXIT_CODE = 75
"""Exit code of a rank that its storage failed; EX_TEMPFAIL of sysexits.h. The same start may succeed later."""
DATA_EXIT_CODE = 65
"""Exit code of a rank whose corpus is damaged or has changed; EX_DATAERR of sysexits.h."""
FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Errors of a disk or quota that is full."""
PASSING_STATUSES = frozenset({408, 425, 429})
"""HTTP statuses of the 400s that may pass."""
DISK_ERRNOS = FULL_ERRNOS | {errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ENOLCK, errno.EROFS}
"""Errors of a disk or of a file server."""
EXPIRED = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired", "RequestTimeTooSkewed", "400"}
)
"""Codes of a service that refuses credentials because of their age. An answer to HEAD has no body, so no other code."""
NO_CREDENTIALS = frozenset(
    {
        *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ConfigNotFound", "TokenRetrievalError"),
        *("UnauthorizedSSOTokenError", "SSOTokenLoadError", "NoAuthTokenError"),
    }
)
"""Names of the errors of a client that has no credentials."""
QUERY = re.compile(r"(?<=://)([^\s?'\"]*)\?[^\s'\"]*")
"""The part of a web address in a message from its host on, with its query."""
OWN_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, NotImplementedError),
    *(RecursionError, SyntaxError, TypeError),
)
"""Errors that no server causes."""


def class_of(error: BaseException, is_known: bool = False) -> FaultClass:
    """Return the class of a failed request. An error of ours may state its class in an attribute `fault`.

    Args:
        error: what the request raised.
        is_known: whether another file, such as a manifest, says that the file exists and its reader has already read
            beside it. "Not found" and "forbidden" then pass: a server that is being updated gives such answers.
    """
    if isinstance(known := getattr(error, "fault", None), FaultClass):
        return known
    error = _origin(error)
    if lacks_credentials(error) or any(isinstance(cause, ssl.SSLCertVerificationError) for cause in chain_of(error)):
        return FaultClass.FORBIDDEN
    has_expired = credentials_expired(error)
    if has_expired or is_missing(error) or is_refused(error):
        return FaultClass.PASSING if has_expired or is_known else FaultClass.FORBIDDEN
    status = status_of(error)
    if status == 416:  # the file ends before the requested range begins
        return FaultClass.DAMAGED
    if status is None:
        return _class_of_plain(error)
    is_forbidden = 400 <= status < 500 and status not in PASSING_STATUSES
    return FaultClass.FORBIDDEN if is_forbidden else FaultClass.PASSING


def _class_of_plain(error: BaseException) -> FaultClass:
    """Return the class of an error that has no HTTP status."""
    number = error.errno if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) else None
    if number is not None and number > 0:  # the errors of host names are negative
        if number == errno.EIO:
            return FaultClass.DAMAGED
        return FaultClass.PASSING if number in PASSING_ERRNOS else FaultClass.FORBIDDEN
    if isinstance(error, FileExistsError | IsADirectoryError):  # of a backend that gives no number
        return FaultClass.FORBIDDEN
    if isinstance(error, OWN_ERRORS) or not isinstance(error, Exception):
        return FaultClass.OWN
    return FaultClass.PASSING


def is_of_storage(error: BaseException) -> bool:
    """Return whether a full or failing disk, a file server, a bucket or the network to it caused an error."""
    return any(_is_link_of_storage(cause) for cause in chain_of(error))


def class_for_ranks(error: BaseException) -> FaultClass | None:
    """Return the class of an error that ends a rank: PASSING if storage caused it, DAMAGED if a corpus did, or None."""
    if is_of_storage(error):
        return FaultClass.PASSING
    is_damaged = any(getattr(cause, "fault", None) is FaultClass.DAMAGED for cause in chain_of(error))
    return FaultClass.DAMAGED if is_damaged else None


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of a rank that an error has ended, which tells a supervisor the class of the failure."""
    codes: dict[FaultClass | None, int] = {FaultClass.PASSING: STORAGE_EXIT_CODE, FaultClass.DAMAGED: DATA_EXIT_CODE}
    return codes.get(class_for_ranks(error), 1)


def _is_link_of_storage(error: BaseException) -> bool:
    if getattr(error, "fault", None) is FaultClass.PASSING:  # a request whose attempts are used up; see retries.py
        return True
    if not isinstance(error, OSError):
        return False
    if error.errno is None:  # of a home of checkpoints, in place of an error of its client
        return error.__cause__ is not None and class_of(error.__cause__) is FaultClass.PASSING
    overloaded = error.errno == errno.EBUSY  # s3fs raises it for a server that is overloaded
    return overloaded or error.errno in DISK_ERRNOS | CONNECTION_ERRNOS


def is_missing(error: BaseException) -> bool:
    """Return whether the answer was that there is no such file."""
    return status_of(error) in (404, 410) or isinstance(_origin(error), FileNotFoundError | NotADirectoryError)


def is_refused(error: BaseException) -> bool:
    """Return whether the answer was that the file may not be read."""
    return status_of(error) in (401, 403, 407) or isinstance(_origin(error), PermissionError)


def lacks_credentials(error: BaseException) -> bool:
    """Return whether this machine has no credentials for the server."""
    return any(type(cause).__name__ in NO_CREDENTIALS for cause in chain_of(error))


def credentials_expired(error: BaseException) -> bool:
    """Return whether the server refused credentials because of their age."""
    return any(_code_of(cause) in EXPIRED for cause in chain_of(error))


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of the answer; None if there was none."""
    error = _origin(error)
    for cause in chain_of(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore, whose errors s3fs hides behind errors of the operating system
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return found if isinstance(found, int) else None
        if isinstance(found := getattr(response, "status_code", None), int):  # httpx and requests
            return found
    # The cause of aiohttp's error for a body that is cut short has a code as well, which no server sent.
    for name in ("status", "code", "get_http_status_code"):  # the last is a method of MLflow's errors
        found = getattr(error, name, None)
        found = found() if callable(found) else found
        if isinstance(found, int) and 100 <= found < 600:
            return found
    return None


def retry_after(error: BaseException) -> float:
    """Return the seconds in the server's Retry-After header; 0 if there is none, or if it holds a date."""
    headers = getattr(error, "headers", None) or {}
    try:
        return float(headers.get("Retry-After", 0))
    except ValueError:
        return 0.0


def in_words(error: BaseException) -> str:
    """Return one line about an error. Errors of time-outs have only their names."""
    text = hide_queries(str(error).partition("\n")[0])
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def hide_queries(text: str) -> str:
    """Return a message without the queries of URLs in it, which may hold signatures."""
    return QUERY.sub(r"\1", text)


def _code_of(error: BaseException) -> str | None:
    """Return the code that an AWS service gave; None if there is none."""
    response = getattr(error, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None


def _origin(error: BaseException) -> BaseException:
    """Return the error that fsspec's web client hides: it reports every failed question as a missing file."""
    return error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ is not None else error


def chain_of(error: BaseException | None, *, with_context: bool = False) -> Iterator[BaseException]:
    """Yield an error and what caused it, each once: an error that is raised again may be its own cause.

    Args:
        error: the last error.
        with_context: an error without a cause was caused by the one that was being handled.
    """
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (error.__context__ if with_context else None)
