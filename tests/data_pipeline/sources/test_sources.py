"""Sources: which files are listed, in which order, and how files at a URL are read."""

import gzip
import http.server
import os
import random
import subprocess
import tarfile
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from byteloom.core.retries import RetryPolicy
from data_pipeline.documents import READ_BYTES
from data_pipeline.errors import BadDocumentError, CorpusError, UnreachableError
from data_pipeline.readers import ReadOptions, document_of, documents_in, is_container
from data_pipeline.sources import opening
from data_pipeline.sources.listing import Selection, list_files
from data_pipeline.sources.opening import open_file
from data_pipeline.sources.source_file import REASONS, Skipped, SourceFile, skipped
from tests.conftest import STDLIB


def listed(*sources: object, **selection: object) -> list[SourceFile | Skipped]:
    return list(list_files([str(source) for source in sources], Selection(**selection)))


def keys(*sources: object, **selection: object) -> list[str]:
    return [found.key for found in listed(*sources, **selection)]


def write(folder: Path, *names: str, content: str = "x\n") -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return folder


def files_under(folder: Path) -> dict[str, int]:
    """Return the sizes of the files that are not empty, by key."""
    paths = [Path(parent) / name for parent, _, names in os.walk(folder) for name in names]
    found = {f"{folder.name}/{path.relative_to(folder).as_posix()}": path.stat().st_size for path in paths}
    return {key: size for key, size in found.items() if size}


@pytest.mark.slow
def test_every_file_of_a_folder_is_listed_once_with_its_size_in_the_order_of_keys():
    found = [file for file in listed(STDLIB / "test") if isinstance(file, SourceFile)]
    assert {file.key: file.size for file in found} == files_under(STDLIB / "test")
    assert [file.key for file in found] == sorted(file.key for file in found)
    assert all(Path(file.url).stat().st_size == file.size for file in found)


def test_folder_sorts_among_files_by_the_keys_of_its_files(tmp_path: Path):
    write(tmp_path / "t", "a/z", "a.txt", "a-b", "b/a/c", "b/a.c")
    assert keys(tmp_path / "t") == ["t/a-b", "t/a.txt", "t/a/z", "t/b/a.c", "t/b/a/c"]


def test_files_and_folders_keep_the_order_of_the_command(tmp_path: Path):
    write(tmp_path, "z/one", "a/two", "m.txt")
    found = listed(tmp_path / "z", tmp_path / "m.txt", tmp_path / "a")
    assert [(file.source, file.key) for file in found] == [(0, "z/one"), (1, "m.txt"), (2, "a/two")]


def test_a_folder_named_by_a_dot_or_a_link_has_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "real", "file")
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "real")
    assert keys(".") == keys(tmp_path / "link") == keys(f"file://{tmp_path}/real") == ["real/file"]


def test_listing_is_lazy(tmp_path: Path):
    write(tmp_path / "t", "a/file", "b/file")
    found = list_files([str(tmp_path / "t")], Selection())
    assert next(found).key == "t/a/file"
    write(tmp_path / "t", "b/late")
    assert [file.key for file in found] == ["t/b/file", "t/b/late"]


def test_file_that_cannot_be_a_document_is_skipped_with_its_reason(tmp_path: Path):
    tree = write(tmp_path / "t", "file", "folder/inner")
    (tree / "empty").touch()
    (tree / "dangling").symlink_to("nowhere")
    (tree / "linked-file").symlink_to("file")
    (tree / "linked-folder").symlink_to("folder")
    os.mkfifo(tree / "pipe")
    found = listed(tree)
    assert {s.key: s.reason for s in found if isinstance(s, Skipped)} == {
        "t/dangling": "dangling link",
        "t/empty": "empty",
        "t/linked-folder": "link",
        "t/pipe": "unreadable",
    }
    assert [f.key for f in found if isinstance(f, SourceFile)] == ["t/file", "t/folder/inner", "t/linked-file"]
    assert all(s.reason in REASONS and str(tree) in s.detail for s in found if isinstance(s, Skipped))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_skipped(tmp_path: Path):
    write(tmp_path / "t", "closed").joinpath("closed").chmod(0)
    [found] = listed(tmp_path / "t")
    assert (found.reason, "Permission denied" in found.detail) == ("unreadable", True)


def test_names_that_are_not_utf8_are_listed(tmp_path: Path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "not-utf8-\udcff").write_bytes(b"x")
    assert keys(tmp_path / "t") == ["t/not-utf8-\udcff"]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({}, ["t/a.py", "t/deep/b.py", "t/deep/c.txt", "t/skip/d.py"]),
        ({"include": ["*.py"]}, ["t/a.py", "t/deep/b.py", "t/skip/d.py"]),
        ({"include": ["deep/*"]}, ["t/deep/b.py", "t/deep/c.txt"]),
        ({"exclude": ["skip"]}, ["t/a.py", "t/deep/b.py", "t/deep/c.txt"]),
        ({"include": ["*.py"], "exclude": ["deep/b.*", "skip"]}, ["t/a.py"]),
    ],
)
def test_patterns_select_by_name_and_by_path(tmp_path: Path, selection: dict[str, list[str]], expected: list[str]):
    write(tmp_path / "t", "a.py", "deep/b.py", "deep/c.txt", "skip/d.py")
    assert keys(tmp_path / "t", **selection) == expected


def test_include_also_selects_a_source_that_is_a_file(tmp_path: Path):
    write(tmp_path, "a.py", "b.txt")
    assert keys(tmp_path / "a.py", tmp_path / "b.txt", include=["*.py"]) == ["a.py"]


class TestSourcesThatCannotBe:
    """Invalid sources, which raise an error before a file is listed."""

    def refused(self, *sources: Path | str) -> str:
        with pytest.raises(CorpusError) as caught:
            list_files(list(map(str, sources)), Selection())
        return str(caught.value)

    def test_missing(self, tmp_path: Path):
        assert self.refused(tmp_path / "none") == f"no such file or folder: {tmp_path}/none"

    def test_two_of_one_name(self, tmp_path: Path):
        write(tmp_path, "a/same/x", "b/same/x")
        assert "have the same name 'same'" in self.refused(tmp_path / "a/same", tmp_path / "b/same")

    def test_one_twice(self, tmp_path: Path):
        write(tmp_path, "a/x")
        (tmp_path / "link").symlink_to("a")
        assert "are the same source" in self.refused(tmp_path / "a", tmp_path / "link")

    def test_one_within_another(self, tmp_path: Path):
        write(tmp_path, "a/b/c/x")
        assert "is inside" in self.refused(tmp_path / "a/b/c", tmp_path / "a")
        assert "is inside" in self.refused(tmp_path / "a", tmp_path / "a/b/c/x")

    def test_remote_ones_too(self):
        fsspec.filesystem("memory").pipe({"/over/lap/x": b"1"})
        assert "is inside" in self.refused("memory://over", "memory://over/lap")
        assert "no such file" in self.refused("memory://not/there")

    def test_of_an_unknown_kind(self):
        assert "cannot read gopher://x" in self.refused("gopher://x")


def git(folder: Path, *arguments: str, given: str = "") -> bytes:
    """Return the output of git. `check-ignore` exits with 1 if nothing is ignored."""
    where = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null", "HOME": str(folder)}
    done = subprocess.run(
        ["git", *arguments], cwd=folder, env=os.environ | where, input=given.encode(), capture_output=True, check=False
    )
    assert done.returncode == 0 or (done.returncode == 1 and arguments[0] == "check-ignore"), done.stderr
    return done.stdout


# fmt: off
RULES = [
    "*.log", "build/", "/a", "!x.log", "!build/", "a/b", "**/b/", "b/**", "a/**/b", "!b/f", "*", "!*/",
    "!*.py", "/*", "?", "[a-b]", "x.[!p]*", "[^a-x]*", "#a", "\\#a", "\\f", "\\!b", "f ", " ",
    "a/", "**", "**/", "/**", "a/**", "**/f", "!a/", "/b/", "a*", "*b", "**a", "a**b", "a/*/b", "!/a/", "!b", "!a",
    "!f", "!a/f", "!a/**", "!**/b", "b", "/b/f", "!/a/b/", "a/*", "!a/*", "/", "//", "a//b", "!", "\\", "a\\", "[a",
    "[]f]", "f\\ ", "f\t", "\t", "[[:alpha:]]", "[![:alpha:]]*", "y.[[:lower:][:digit:]]*", "*.*", "./a",
]
# fmt: on


class TestGitignore:
    @pytest.mark.slow
    def test_git_agrees(self, tmp_path: Path):
        """Random trees have random rules at every level. `git check-ignore` gives the expected result."""
        names = ["a", "b", "build", "f", "x.log", "y.py", "#a", "f "]
        choose = random.Random(0)
        for number in range(60):
            top = tmp_path / str(number)
            for _ in range(30):
                path = top.joinpath(*choose.choices(names, k=choose.randint(1, 4)))
                if not path.is_dir() and not any(parent.is_file() for parent in path.parents):
                    write(path.parent, path.name)
            for folder in [top, *(path for path in top.rglob("*") if path.is_dir())]:
                if choose.random() < 0.4:
                    rules = "\n".join(choose.choices(RULES, k=3)) + choose.choice(["", "\n", "\r\n"])
                    (folder / ".gitignore").write_text(rules)
            paths = {path.relative_to(top).as_posix() for path in top.rglob("*") if path.is_file()}
            git(top, "init", "-q")
            ignored = git(top, "check-ignore", "-z", "--stdin", given="\0".join(paths)).decode().split("\0")
            assert keys(top, gitignore=True) == sorted(f"{number}/{path}" for path in paths.difference(ignored))

    def test_rules_of_parent_folders_apply_up_to_the_top_of_the_repository(self, tmp_path: Path):
        write(tmp_path, ".gitignore", content="*\n")  # outside of the repository
        write(tmp_path / "repository", ".gitignore", content="*.pyc\n/lib/generated/\n")
        write(
            tmp_path / "repository", "lib/a.py", "lib/a.pyc", "lib/generated/b.py", "lib/deep/generated/c.py", ".git/x"
        )
        assert keys(tmp_path / "repository/lib", gitignore=True) == ["lib/a.py", "lib/deep/generated/c.py"]

    def test_an_ignored_folder_that_is_named_is_read(self, tmp_path: Path):
        write(tmp_path / "r", ".gitignore", content="build/\n*.o\n")
        write(tmp_path / "r", ".git/x", "build/a.txt")
        assert keys(tmp_path / "r/build", gitignore=True) == ["build/a.txt"]

    def test_rules_are_also_read_at_a_url(self):
        files = {
            "/tree/.gitignore": b"*.log",
            "/tree/a.log": b"1",
            "/tree/b/.gitignore": b"!a.log",
            "/tree/b/a.log": b"1",
        }
        fsspec.filesystem("memory").pipe(files)
        assert keys("memory://tree", gitignore=True) == ["tree/.gitignore", "tree/b/.gitignore", "tree/b/a.log"]

    def test_everything_is_listed_without_the_option(self, tmp_path: Path):
        write(tmp_path / "r", ".gitignore", content="*\n")
        write(tmp_path / "r", ".git/x", "a")
        assert keys(tmp_path / "r") == ["r/.git/x", "r/.gitignore", "r/a"]


def test_a_file_that_vanished_is_a_bad_document(tmp_path: Path):
    with pytest.raises(BadDocumentError, match=r"cannot read .*/gone: No such file or directory$") as caught:
        open_file(str(tmp_path / "gone"))
    assert skipped("k", caught.value) == Skipped("k", "unreadable", str(caught.value))


def test_reading_a_folder_is_a_bad_document(tmp_path: Path):
    with pytest.raises(BadDocumentError, match="Is a directory"):
        open_file(str(tmp_path))


def test_bucket_is_listed_like_a_folder():
    files = {"/bucket/shelf/a": b"1", "/bucket/shelf/a.b/c": b"22", "/bucket/shelf/empty": b"", "/bucket/other": b"1"}
    fsspec.filesystem("memory").pipe(files)
    found = listed("memory://bucket/shelf")
    assert [(file.key, getattr(file, "size", None)) for file in found] == [
        ("shelf/a", 1),
        ("shelf/a.b/c", 2),
        ("shelf/empty", None),
    ]
    assert [open_file(file.url).read() for file in found[:2]] == [b"1", b"22"]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield the URL of a bucket of a local S3 server."""
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    files.mkdir("bucket")
    yield "s3://bucket"
    server.stop()


@pytest.mark.slow
def test_s3_is_listed_and_read(bucket: str):
    content = random.Random(0).randbytes(9 << 20)  # more than one request
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    files.pipe({f"{bucket}/shelf/a.bin": content, f"{bucket}/shelf/deep/b": b"b", f"{bucket}/shelf/e": b""})
    files.call_s3(
        "put_object", Bucket="bucket", Key="shelf/deep/"
    )  # a folder object, like those that web consoles create
    found = listed(f"{bucket}/shelf")
    assert [(f.key, f.size) for f in found if isinstance(f, SourceFile)] == [
        ("shelf/a.bin", 9 << 20),
        ("shelf/deep/b", 1),
    ]
    assert [s.key for s in found if isinstance(s, Skipped)] == ["shelf/e"]
    with open_file(found[0].url) as stream:
        assert stream.read() == content
        stream.seek(-5, os.SEEK_END)
        assert stream.read() == content[-5:]
    assert keys(f"{bucket}/shelf/deep/b") == ["b"]
    with pytest.raises(CorpusError, match="no such file or folder"):
        list_files([f"{bucket}/none"], Selection())


Serve = Callable[..., str]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Yield a function that starts a web server for a folder. It sends `cut` bytes of each answer, then disconnects."""
    servers = []

    def start(folder: Path, cut: int | None = None, length: bool = True) -> str:
        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *arguments: object) -> None:
                super().__init__(*arguments, directory=str(folder))

            def send_header(self, keyword: str, value: str) -> None:
                if length or keyword != "Content-Length":
                    super().send_header(keyword, value)

            def copyfile(self, source, outputfile) -> None:
                outputfile.write(source.read(cut))

            def log_message(self, *_: object) -> None: ...

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_web_page_is_one_file_read_in_one_stream(tmp_path: Path, serve: Serve):
    content = random.Random(1).randbytes(3 * READ_BYTES + 7)
    (tmp_path / "big file.bin").write_bytes(content)
    (tmp_path / "empty").touch()
    url = serve(tmp_path)
    file, empty = listed(f"{url}/big%20file.bin?token=1/2", f"{url}/empty")
    assert file[:4] == (0, f"{url}/big%20file.bin?token=1/2", "big file.bin", len(content))
    assert (empty.key, empty.reason) == ("empty", "empty")
    for _ in range(2):
        with open_file(file.url) as stream:
            assert b"".join(iter(lambda: stream.read(READ_BYTES), b"")) == content


def test_a_server_without_sizes_is_read(tmp_path: Path, serve: Serve):
    (tmp_path / "file").write_bytes(b"content")
    [file] = listed(f"{serve(tmp_path, length=False)}/file")
    assert file.size is None
    assert open_file(file.url).read() == b"content"


def test_a_missing_page_is_named_before_anything_is_listed(tmp_path: Path, serve: Serve):
    with pytest.raises(CorpusError, match=r"no such file or folder: http.*/none \(.*404"):
        list_files([f"{serve(tmp_path)}/none"], Selection())


def test_a_server_that_refuses_connections_is_named_with_the_reason(impatient: None):
    with pytest.raises(CorpusError, match=r"cannot be read: http://127.0.0.1:9/x \(Connect call failed"):
        list_files(["http://127.0.0.1:9/x"], Selection())


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SOURCE_POLICY", "QUESTION_POLICY"):
        monkeypatch.setattr(opening, name, RetryPolicy(attempts=2, backoff_seconds=0.001, deadline_seconds=60.0))


def test_interrupted_download_is_an_error_and_not_the_end_of_the_file(tmp_path: Path, serve: Serve, impatient: None):
    (tmp_path / "file").write_bytes(bytes(5000))
    url = f"{serve(tmp_path, cut=1000)}/file"
    with open_file(url) as stream, pytest.raises(UnreachableError, match=rf"cannot read {url}: \w+.*") as caught:
        stream.read()
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_folders(tmp_path: Path):
    """There are forty folders of a hundred files. Only the entries of one folder are held."""
    for folder in range(40):
        (tmp_path / f"t/{folder:02d}").mkdir(parents=True)
        for file in range(100):
            (tmp_path / f"t/{folder:02d}/{file:02d}").touch()
    tracemalloc.start()
    found = list_files([str(tmp_path / "t")], Selection())
    for _ in range(200):
        next(found)
    early, _ = tracemalloc.get_traced_memory()
    assert sum(1 for _ in found) == 4_000 - 200
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - early < 50_000  # a folder's entries are some 40 kB; all of them would be 1.6 MB


def test_documents_of_every_kind_come_from_a_web_server(tmp_path: Path, serve: Serve):
    """Media and Parquet files are not read sequentially."""
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    soundfile.write(tmp_path / "a.flac", np.arange(100, dtype=np.int16), 8000)
    pq.write_table(pa.table({"text": ["row"]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "line"}\n'))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "a.png", "a.png")
    url, options = serve(tmp_path), ReadOptions()
    contents = {}
    for file in list_files([f"{url}/a.{kind}" for kind in ("png", "flac", "parquet", "jsonl.gz", "tar")], Selection()):
        for document in documents_in(file, options) if is_container(file, options) else [document_of(file, options)]:
            contents[document.key] = b"".join(document.read())
    assert contents == {
        "a.png": pixels.tobytes(),
        "a.flac": np.arange(100, dtype="<i2").tobytes(),
        "a.parquet#000000000": b"row",
        "a.jsonl.gz#000000000": b"line",
        "a.tar/a.png": pixels.tobytes(),
    }


def test_tars_of_the_standard_library_open_as_streams(tmp_path: Path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(STDLIB / "json", "json")
    with open_file(str(tmp_path / "t.tar")) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        assert "json/decoder.py" in tar.getnames()
