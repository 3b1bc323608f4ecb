"""Real HTTP server of file ranges that injects the faults of real servers."""

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

FAULTS = ("drop", "short", "stall", "busy", "broken", "whole", "elsewhere", "flip")
"""Faults of an answer.

drop: the connection closes in the middle. short: half of the answer, with the length of that half. stall: half of the
answer, then nothing. busy: 503 with Retry-After. broken: 500. whole: the file instead of the range. elsewhere: bytes of
another range. flip: one wrong bit.
"""
REFUSALS = ("missing", "denied", "drip")
"""missing: 404. denied: 403. drip: a byte each hundredth of a second, so that the connection is never silent."""
STATUSES = {"busy": 503, "broken": 500, "missing": 404, "denied": 403}
"""Statuses of the faults that are an answer without a body."""


class FaultyServer:
    """HTTP server of a folder, at `url`.

    Args:
        fault_of: function from a file's name to the fault of its next answer, or None.
    """

    def __init__(self, folder: Path, fault_of: Callable[[str], str | None] = lambda name: None) -> None:
        self.folder = folder
        self.fault_of = fault_of
        self.requests = Counter[str]()
        """Number of requests by file."""
        self.injected = Counter[str]()
        """Number of injected faults by fault."""
        self.paths = list[str]()
        """Paths of all requests, with their queries; whole URLs if the server is used as a proxy."""
        self.forbidden = set[str]()
        """Files that are answered with 403, whether they exist or not."""
        self.retry_after = 0.01
        """Value of Retry-After for `busy`, in seconds."""
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/corpus"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                if outer.closing.is_set():
                    self.close_connection = True
                    return
                outer.paths.append(self.path)
                self._range = None
                asked = self.path.partition("?")[0]
                path = outer.folder / (asked.partition("/corpus/")[2] or Path(asked).name)
                outer.requests[path.name] += 1
                if path.name in outer.forbidden:
                    self._answer(403, b"")
                    return
                if not path.is_file():
                    self._answer(404, b"")
                    return
                fault = outer.fault_of(path.name)
                if fault:
                    outer.injected[fault] += 1
                content = path.read_bytes()
                requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                status, begin, end = 200, 0, len(content)
                if requested and fault != "whole":
                    status, begin, end = 206, int(requested[1]), int(requested[2] or len(content) - 1) + 1
                if begin >= len(content):
                    self._answer(416, b"")
                    return
                self._range = f"bytes {begin}-{end - 1}/{len(content)}" if status == 206 else None
                self._answer(status, content[begin:end], fault, content)

            def _answer(self, status: int, body: bytes, fault: str | None = None, content: bytes = b"") -> None:
                if fault in STATUSES:
                    status, body = STATUSES[fault], b"no"
                    self._range = None
                elif fault == "elsewhere":
                    body = (content * 2)[97 : 97 + len(body)]
                elif fault == "flip":
                    place = len(body) // 2
                    body = body[:place] + bytes([body[place] ^ 8]) + body[place + 1 :]
                half = body[: len(body) // 2]
                self.send_response(status)
                self.send_header("Content-Length", str(len(half if fault == "short" else body)))
                if self._range:
                    self.send_header("Content-Range", self._range)
                if fault == "busy":
                    self.send_header("Retry-After", str(outer.retry_after))
                self.end_headers()
                if fault == "drip":
                    for place in range(len(body)):
                        self.wfile.write(body[place : place + 1])
                        if outer.closing.wait(0.01):
                            return
                    return
                self.wfile.write(half if fault in ("drop", "short", "stall") else body)
                if fault == "stall":
                    self.wfile.flush()
                    outer.closing.wait(5)
                if fault in ("drop", "stall"):
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

            def handle(self) -> None:
                with contextlib.suppress(ConnectionError):  # the client has closed the connection
                    super().handle()

        return Handler

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
