"""A real `mlflow server`, and a faulty server in its place."""

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from launchers.processes import free_port
from pretrain.tracking.mlflow.store import MlflowStore

if TYPE_CHECKING:
    from mlflow import MlflowClient


def client_of(uri: str) -> "MlflowClient":
    """Return a client of a store. The collection of tests does not import MLflow, which takes seconds."""
    from mlflow import MlflowClient  # noqa: PLC0415

    return MlflowClient(uri)


@cache
def _new_database() -> bytes:
    """Return the content of a database as MLflow makes it, which takes seconds."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "mlflow.db"
        MlflowStore(f"sqlite:///{path}").client.search_experiments()
        return path.read_bytes()


def make_store(path: Path) -> None:
    """Put an empty store of MLflow at a path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_new_database())


class Server:
    """Real `mlflow server` on loopback that can be killed and restarted on the same store.

    Args:
        store: database of the server; None makes a new one.
    """

    def __init__(self, folder: Path, store: Path | None = None) -> None:
        self.port = free_port()  # none that the kernel may give to a connection before the server starts
        self.folder = folder
        self.store = store or folder / "server.db"
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if not self.store.exists():
            make_store(self.store)
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port),
                    "--workers", "1", "--backend-store-uri", f"sqlite:///{self.store}",
                    "--artifacts-destination", str(self.folder / "artifacts"),
                ],
                stdout=log, stderr=log, start_new_session=True,
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # seven unneeded processes
            )  # fmt: skip
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.2)
        raise AssertionError((self.folder / "server.log").read_text())

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@contextmanager
def misbehaving(fault: str, requests: list[str] | None = None) -> Iterator[str]:
    """Serve a fault: an HTTP status, "html", "json", "hangs" or "closes". Yields the server's address.

    The paths of all requests are appended to `requests`.
    """
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            if requests is not None:
                requests.append(self.path)
            if fault == "hangs":
                ended.wait(60)
            if fault in ("hangs", "closes"):
                self.close_connection = True
                return
            body = b"{}" if fault == "json" else b"<html>Welcome</html>" * 50
            self.send_response(int(fault) if fault.isdecimal() else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = answer  # noqa: N815 (named by the library)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
