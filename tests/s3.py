"""A real S3 server on this machine, and proxies to it that can stall or fail."""

import http.client
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer


def s3_client() -> Any:
    """Return a client of the server that this environment names; making one reads a large description of S3."""
    return _client_of(os.environ["AWS_ENDPOINT_URL"])


@cache
def _client_of(uri: str) -> Any:
    return boto3.client("s3", endpoint_url=uri)


@contextmanager
def s3_server(bucket: str) -> Iterator[None]:
    """Run a server with an empty bucket, and set the environment variables that name it."""
    sys.audit("tests.server", bucket)  # the server binds its port in a thread, where --fast cannot skip the test
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        s3_client().create_bucket(Bucket=bucket)
        yield
    server.stop()


class StallingProxy:
    """Proxy to a server that holds requests that contain some bytes, such as the name of a file.

    Args:
        address: host and port of the server.
    """

    def __init__(self, address: tuple[str, int]) -> None:
        self.waits_for: bytes | None = None
        """Bytes whose requests wait, or None."""
        self._address = address
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection(self._address)
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pass_on, args=(source, target, source is client), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, is_request: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                while is_request and self.waits_for is not None and self.waits_for in data:
                    time.sleep(0.05)
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def stalling_proxy() -> Iterator[StallingProxy]:
    """Route requests of this environment to the server of `s3_server` through a `StallingProxy`."""
    host, _, port = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://").partition(":")
    proxy = StallingProxy((host, int(port)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.uri)
        yield proxy


class FaultyS3:
    """Proxy to a server whose answers may fail.

    Args:
        address: host and port of the server.
        fault_of: the fault of the next answer, by the request's path and credentials; None for a good one.
        host: address of this proxy.
    """

    def __init__(
        self, address: tuple[str, int], fault_of: Callable[[str, str], str | None], host: str = "127.0.0.1"
    ) -> None:
        self.fault_of = fault_of
        self.injected = Counter[str]()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fault = outer.fault_of(self.path, self.headers.get("Authorization", ""))
                if fault:
                    outer.injected[fault] += 1
                if fault in S3_FAULTS:
                    status, code = S3_FAULTS[fault]
                    answer = f"<Error><Code>{code}</Code><Message>{fault}</Message></Error>".encode()
                    headers, length = {"Content-Type": "application/xml"}, len(answer)
                else:
                    server = http.client.HTTPConnection(*address)
                    server.request(self.command, self.path, body, dict(self.headers))
                    found = server.getresponse()
                    status, answer = found.status, found.read()
                    headers = {key: value for key, value in found.getheaders() if key.lower() not in HOP_HEADERS}
                    length = int(found.getheader("Content-Length", len(answer)))  # of HEAD, that of the object
                    server.close()
                self.send_response_only(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer[: len(answer) // 2] if fault == "cut" else answer)
                self.close_connection = fault == "cut"

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass  # noqa: N815 - names of http.server

            def log_message(self, *_: object) -> None:
                pass

            def handle(self) -> None:
                with suppress(ConnectionError):  # a client that gave up
                    super().handle()

        self._server = ThreadingHTTPServer((host, 0), Handler)
        self._server.daemon_threads = True
        self.uri = f"http://{host}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


S3_FAULTS = {
    **{"expired": (400, "ExpiredToken"), "busy": (503, "SlowDown"), "broken": (500, "InternalError")},
    **{"missing": (404, "NoSuchKey"), "denied": (403, "AccessDenied")},
}
"""Status and code of the answers that are an error; `cut` is half of a good answer."""
HOP_HEADERS = frozenset({"connection", "transfer-encoding", "content-length", "keep-alive"})


@contextmanager
def faulty_proxy(fault_of: Callable[[str, str], str | None], host: str = "127.0.0.1") -> Iterator[FaultyS3]:
    """Route requests of this environment to the server of `s3_server` through a `FaultyS3` at an address."""
    address, _, port = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://").partition(":")
    proxy = FaultyS3((address, int(port)), fault_of, host)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.uri)
        yield proxy
    proxy.close()
