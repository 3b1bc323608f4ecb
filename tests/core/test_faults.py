"""Classes of failures, and how often a request is repeated."""

import errno
import os
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor

import aiohttp
import botocore.exceptions
import pytest
from s3fs.errors import translate_boto_error
from yarl import URL

from byteloom.core.faults import FaultClass, chain_of, class_of, is_of_storage
from byteloom.core.retries import RequestError, RequestStoppedError, RetryPolicy, retry

PASSING, FORBIDDEN, DAMAGED, OWN = FaultClass
FAST = RetryPolicy(attempts=4, backoff_seconds=0.001, deadline_seconds=60.0)


def answered(status: int) -> Exception:
    request = aiohttp.RequestInfo(URL("http://host/file"), "GET", {}, URL("http://host/file"))
    return aiohttp.ClientResponseError(request, (), status=status)


def aws(code: str, status: int) -> Exception:
    response = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(botocore.exceptions.ClientError(response, "GetObject"))


def of_errno(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected", "of_known_file"),
    [
        (of_errno(errno.ESTALE), PASSING, PASSING),
        (of_errno(errno.EMFILE), PASSING, PASSING),
        (of_errno(errno.ECONNRESET), PASSING, PASSING),
        (of_errno(errno.EACCES), FORBIDDEN, PASSING),
        (of_errno(errno.ENOENT), FORBIDDEN, PASSING),
        (of_errno(errno.EIO), DAMAGED, DAMAGED),
        (FileExistsError("of a backend without numbers"), FORBIDDEN, FORBIDDEN),
        (TimeoutError(), PASSING, PASSING),
        (ssl.SSLError(1, "record layer failure"), PASSING, PASSING),
        (ssl.SSLCertVerificationError(1, "self-signed certificate"), FORBIDDEN, FORBIDDEN),
        (answered(404), FORBIDDEN, PASSING),
        (answered(403), FORBIDDEN, PASSING),
        (answered(400), FORBIDDEN, FORBIDDEN),
        (answered(416), DAMAGED, DAMAGED),
        (answered(429), PASSING, PASSING),
        (answered(503), PASSING, PASSING),
        (aiohttp.ClientPayloadError("cut"), PASSING, PASSING),
        (caused(FileNotFoundError("url"), answered(503)), PASSING, PASSING),  # fsspec's answer to any failed question
        (caused(FileNotFoundError("url"), answered(403)), FORBIDDEN, PASSING),
        (aws("NoSuchKey", 404), FORBIDDEN, PASSING),
        (aws("AccessDenied", 403), FORBIDDEN, PASSING),
        (aws("SlowDown", 503), PASSING, PASSING),
        (aws("InternalError", 500), PASSING, PASSING),
        (aws("InvalidRange", 416), DAMAGED, DAMAGED),
        (aws("ExpiredToken", 400), PASSING, PASSING),
        (aws("400", 400), PASSING, PASSING),  # the same as an answer to HEAD
        (botocore.exceptions.NoCredentialsError(), FORBIDDEN, FORBIDDEN),
        (botocore.exceptions.EndpointConnectionError(endpoint_url="http://host"), PASSING, PASSING),
        (TypeError("a slip of ours"), OWN, OWN),
    ],
)
def test_a_failure_has_a_class(error: Exception, expected: FaultClass, of_known_file: FaultClass):
    assert class_of(error) is expected
    assert class_of(error, is_known=True) is of_known_file


@pytest.mark.parametrize(("error", "attempts"), [(of_errno(errno.ESTALE), 4), (of_errno(errno.EACCES), 1)])
def test_only_passing_faults_are_repeated(error: OSError, attempts: int):
    made = list[int]()

    def request() -> None:
        made.append(1)
        raise error

    with pytest.raises(RequestError) as caught:
        retry(request, FAST, "a file")
    assert len(made) == attempts
    assert caught.value.__cause__ is error


def test_a_fault_of_the_program_stays_what_it_is():
    with pytest.raises(ZeroDivisionError):
        retry(lambda: 1 // 0, FAST, "a file")


def test_the_deadline_ends_the_attempts():
    made = list[int]()

    def request() -> None:
        made.append(1)
        raise TimeoutError

    with pytest.raises(RequestError, match="attempt 1 of 9"):
        retry(request, RetryPolicy(9, 1e9, 0.0), "a file")
    assert len(made) == 1


def test_a_pause_ends_when_its_owner_stops():
    stopped, failed = threading.Event(), threading.Event()

    def request() -> None:
        failed.set()
        raise TimeoutError

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(retry, request, RetryPolicy(99, 1e9, 1e9), "a file", stopped=stopped)
        assert failed.wait(10)
        stopped.set()
        with pytest.raises(RequestStoppedError):
            asked.result(10)


def test_error_that_is_its_own_cause_is_looked_at_once():
    error, other = FileNotFoundError("a"), FileNotFoundError("b")
    error.__cause__, other.__cause__ = error, error
    assert list(chain_of(other)) == [other, error]
    assert not is_of_storage(other)
