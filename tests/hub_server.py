"""Real HTTP server of a dataset repository, with the requests of the Hugging Face Hub that reading takes."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Server of the files of a folder as `datasets/REPOSITORY`, at `url`.

    Args:
        folder: of the repository.
        repository: `owner/name`.
    """

    def __init__(self, folder: Path, repository: str) -> None:
        self.folder, self.repository = folder, repository
        self.requests = list[str]()
        """Method and path of every request."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def entry(self, path: Path) -> dict[str, Any]:
        """Return a file or folder as the Hub's tree has it."""
        name = str(path.relative_to(self.folder))
        if path.is_dir():
            return {"type": "directory", "oid": COMMIT, "size": 0, "path": name}
        return {"type": "file", "oid": digest(path), "size": path.stat().st_size, "path": name}

    def tree(self, below: str, recursive: bool) -> list[dict[str, Any]]:
        found = sorted((self.folder / below).glob("**/*" if recursive else "*"))
        return [self.entry(path) for path in found]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self
        api, files = f"/api/datasets/{self.repository}", f"/datasets/{self.repository}/resolve/"

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                self._serve()

            def do_HEAD(self) -> None:
                self._serve()

            def do_POST(self) -> None:
                self._serve()

            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.requests.append(f"{self.command} {self.path}")
                split = urlsplit(self.path)
                path = unquote(split.path)
                if path.startswith(files):
                    self._file(outer.folder / path.removeprefix(files).partition("/")[2])
                elif path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
                    siblings = [{"rfilename": entry["path"]} for entry in outer.tree("", True) if entry["size"]]
                    self._json({"id": outer.repository, "sha": COMMIT, "siblings": siblings, "private": False})
                elif found := re.fullmatch(rf"{api}/tree/[^/]+(?:/(.*))?", path):
                    if (outer.folder / (found[1] or "")).is_dir():
                        self._json(outer.tree(found[1] or "", "recursive=true" in split.query.lower()))
                    else:
                        self._missing("EntryNotFound")
                elif re.fullmatch(rf"{api}/paths-info/[^/]+", path):
                    asked = [outer.folder / name for name in json.loads(body)["paths"]]
                    self._json([outer.entry(each) for each in asked if each.exists()])
                else:
                    self._missing("RepoNotFound")

            def _file(self, path: Path) -> None:
                if not path.is_file():
                    self._missing("EntryNotFound")
                    return
                content = path.read_bytes()
                asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                begin, end = (int(asked[1]), int(asked[2] or len(content) - 1) + 1) if asked else (0, len(content))
                about = {"ETag": f'"{digest(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
                if asked:
                    about["Content-Range"] = f"bytes {begin}-{min(end, len(content)) - 1}/{len(content)}"
                self._answer(206 if asked else 200, content[begin:end], about)

            def _json(self, content: Any) -> None:
                self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

            def _missing(self, code: str) -> None:
                self._answer(404, b"{}", {"X-Error-Code": code})

            def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def digest(path: Path) -> str:
    """Return the git hash of a file's content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
