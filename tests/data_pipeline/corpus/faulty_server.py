"""A real HTTP server of files, by range, that can be told to fail in every way a server fails."""

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

FAULTS = ("drop", "short", "stall", "busy", "broken", "whole", "elsewhere", "flip")
"""drop: the connection ends in the middle of the answer. short: half the answer, with the length of that half. stall:
half of the answer, then nothing. busy: 503 with Retry-After. broken: 500. whole: the file, not the range. elsewhere: as
many bytes of another range. flip: one wrong bit."""


class FaultyServer:
    """Serves a folder at `url`.

    Args:
        fault_of: the fault of the next answer, by the file's name; None for a good one.
    """

    def __init__(self, folder: Path, fault_of: Callable[[str], str | None] = lambda name: None) -> None:
        self.folder = folder
        self.fault_of = fault_of
        self.requests = Counter[str]()
        """By file."""
        self.injected = Counter[str]()
        """By fault."""
        self.forbidden = set[str]()
        """Files that are answered with 403, there or not."""
        self.retry_after = 0.01
        """Seconds that `busy` asks for."""
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
                path = outer.folder / Path(self.path).name
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
                wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                status, begin, end = 200, 0, len(content)
                if wanted and fault != "whole":
                    status, begin, end = 206, int(wanted[1]), int(wanted[2]) + 1
                if begin >= len(content):
                    self._answer(416, b"")
                    return
                self._answer(status, content[begin:end], fault, content)

            def _answer(self, status: int, body: bytes, fault: str | None = None, content: bytes = b"") -> None:
                if fault in ("busy", "broken"):
                    status, body = (503, b"later") if fault == "busy" else (500, b"oops")
                elif fault == "elsewhere":
                    body = (content * 2)[97 : 97 + len(body)]
                elif fault == "flip":
                    place = len(body) // 2
                    body = body[:place] + bytes([body[place] ^ 8]) + body[place + 1 :]
                half = body[: len(body) // 2]
                self.send_response(status)
                self.send_header("Content-Length", str(len(half if fault == "short" else body)))
                if fault == "busy":
                    self.send_header("Retry-After", str(outer.retry_after))
                self.end_headers()
                self.wfile.write(half if fault in ("drop", "short", "stall") else body)
                if fault == "stall":
                    self.wfile.flush()
                    outer.closing.wait(5)
                if fault in ("drop", "stall"):
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

            def handle(self) -> None:
                with contextlib.suppress(ConnectionError):  # a client that gave up
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
