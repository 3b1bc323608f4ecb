"""Preparation that is killed, restarted and shared gives the same corpus and repeats no work."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import data_pipeline.preparation.prepare as module
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.preparation.layout import Layout
from data_pipeline.preparation.prepare import prepare
from tests.commands import BYTELOOM, environment
from tests.conftest import STDLIB, Run, prepare_options

OPTIONS = {
    "include": ["*.py", "*.tar", "*.jsonl"],
    "holdout": 0.1,
    "shard_bytes": 300_000,
    "block_bytes": 20_000,
    "level": 9,
    "deduplicate": True,
}
PREPARE = """
import json, sys
from pathlib import Path
from data_pipeline.preparation import prepare
from data_pipeline.preparation import plan, spill
from tests.conftest import prepare_options

plan.UNIT_BYTES, spill.BUFFER_BYTES, spill.LARGE_BYTES, prepare.SMALL_BYTES = 200_000, 150_000, 50_000, 0
out, workers, task, of, options, *sources = sys.argv[1:]
prepare.prepare(
    sources, Path(out), prepare_options(**json.loads(options)), lambda done, total: None, int(workers),
    prepare.Task(int(task), int(of)),
)
"""
"""Script that prepares like the command, in small steps and without the libraries of models."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return folders, JSON lines and a tar of about 6 MB. Some documents are longer than a block, some are repeated."""
    folder = tmp_path_factory.mktemp("sources")
    files = sorted((STDLIB / "idlelib").rglob("*.py"))
    with (folder / "lines.jsonl").open("w") as lines:
        for path in files * 2:
            lines.write(json.dumps({"text": path.read_text()}) + "\n")
    with tarfile.open(folder / "members.tar", "w") as tar:
        for path in sorted((STDLIB / "xml").rglob("*.py")):
            tar.add(path, path.name)
        tar.add(STDLIB / "pydoc_data/topics.py", "topics.py")
    return [*(STDLIB / name for name in ("asyncio", "email", "unittest")), *folder.iterdir()]


@pytest.fixture(scope="module")
def undisturbed(sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    prepare(sources, out, prepare_options(**OPTIONS), lambda done, total: None)
    assert len(Corpus(out / "train").manifest["shards"]) > 10
    return out


@pytest.fixture
def out() -> Iterator[Path]:
    """Return OUT in its own folder, in memory if possible: a killed process loses no written data."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder) / "out"


def start(out: Path, sources: list[Path], workers: int = 1, task: int = 0, of: int = 1) -> subprocess.Popen[bytes]:
    arguments = [str(out), str(workers), str(task), str(of), json.dumps(OPTIONS), *map(str, sources)]
    command = [sys.executable, "-c", PREPARE, *arguments]
    return subprocess.Popen(command, env=environment(), start_new_session=True)


def workers_of(process: subprocess.Popen[bytes]) -> list[int]:
    """Return the child processes of a living process."""
    try:
        children = [path.read_text().split() for path in Path(f"/proc/{process.pid}/task").glob("*/children")]
    except OSError:
        return []
    return [int(child) for line in children for child in line]


def assert_same(out: Path, undisturbed: Path) -> None:
    for part in ("train", "validation"):
        with Corpus(out / part) as corpus, Corpus(undisturbed / part) as expected:
            assert corpus.manifest == expected.manifest
    for name in ("report.json", "skipped.jsonl"):
        assert (out / name).read_text() == (undisturbed / name).read_text()
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def finished_shards(out: Path) -> dict[str, tuple[int, int]]:
    """Return inode and modification time of the finished shards, in OUT.partial or in OUT."""
    if out.exists():
        paths = list(out.rglob("*.tar"))
    else:
        partial = out.with_name("out.partial")
        paths = [shard_of(partial, int(done.stem)) for done in partial.glob("shards/??????.json")]
    return {f"{path.parent.name}/{path.name}": (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def shard_of(partial: Path, job: int) -> Path:
    part, number = Layout.load(partial).shard(job)
    return partial / "corpus" / ("train", "validation")[part] / f"shard-{number:06d}.tar"


@pytest.mark.slow
def test_killed_at_random_until_it_is_finished(sources, undisturbed: Path, out: Path):
    random_ = random.Random(1)
    kills = 0
    while not out.exists() or out.with_name("out.partial").exists():
        before = finished_shards(out)
        of = random_.randint(1, 3)
        process = start(out, sources, random_.randint(1, 2), random_.randrange(of), of)
        try:
            assert process.wait(random_.uniform(0.1, 0.2 + 0.2 * kills)) == 0  # longer each time, so that it ends
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        assert before.items() <= finished_shards(out).items()
    assert kills >= 3
    assert_same(out, undisturbed)


@pytest.mark.slow
def test_workers_that_are_killed_are_replaced(sources, undisturbed: Path, out: Path):
    random_ = random.Random(3)
    process = start(out, sources, workers=2)
    kills = 0
    while process.poll() is None and kills < 3:
        time.sleep(random_.uniform(0.4, 0.7))
        if children := workers_of(process):
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(random_.choice(children), signal.SIGKILL)
                kills += 1
    assert process.wait() == 0
    assert kills
    assert_same(out, undisturbed)


@pytest.mark.slow
def test_workers_end_when_the_process_that_started_them_is_killed(sources, out: Path):
    process = start(out, sources, workers=2)
    while len(workers := workers_of(process)) < 2:
        time.sleep(0.01)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(is_alive(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("killed_at", ["_write_indexes", "_write_skipped", "rmtree", "sync", "remove"])
def test_killed_while_finishing(sources, undisturbed: Path, out: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str):
    """The restart does the remaining steps after any last step, and reads no document again."""
    where = SimpleNamespace(**vars(shutil)) if killed_at == "rmtree" else module
    do = getattr(where, killed_at)

    def do_and_die(*arguments: object, **options: object) -> None:
        do(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(where, killed_at, do_and_die)
        patch.setattr(module, "shutil", where if killed_at == "rmtree" else shutil)
        prepare(sources, out, prepare_options(**OPTIONS), lambda done, total: None)
    monkeypatch.setattr(module.Scatter, "do", pytest.fail)
    monkeypatch.setattr(module.Gather, "do", pytest.fail)
    prepare(sources, out, prepare_options(**OPTIONS), lambda done, total: None)
    assert_same(out, undisturbed)


@pytest.mark.slow
def test_simultaneous_tasks_share_the_work(sources, undisturbed: Path, out: Path):
    tasks = [start(out, sources, workers=1, task=number, of=4) for number in range(3)]  # the fourth task never starts
    assert [task.wait() for task in tasks] == [0, 0, 0]
    assert_same(out, undisturbed)


@pytest.fixture
def begun(sources: list[Path], out: Path) -> Path:
    """Return OUT of a preparation that was killed when some shards were finished."""
    process = start(out, sources)
    while len(finished_shards(out)) < 3:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    return out


@pytest.mark.slow
def test_the_command_continues_the_work_of_a_killed_one(begun: Path, sources, undisturbed: Path, byteloom: Run):
    before = finished_shards(begun)
    arguments = [argument for name in OPTIONS["include"] for argument in ("--include", name)]
    arguments += ["--holdout", "0.1", "--shard-bytes", "300000", "--block-bytes", "20000", "--level", "9"]
    done = byteloom("prepare", *sources, "--out", begun, *arguments, "--deduplicate", "--task", "1", "--of", "2")
    assert "documents in" in done.stderr
    assert before.items() <= finished_shards(begun).items()
    assert_same(begun, undisturbed)


@pytest.mark.slow
def test_ctrl_c_ends_the_work_and_names_how_to_continue(sources, tmp_path: Path):
    command = [BYTELOOM, "prepare", STDLIB, "--out", "out", "--skip-bad"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "out.partial/plan.json").exists():
        time.sleep(0.01)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert not (tmp_path / "out").exists()
    assert (
        said.strip().splitlines()[-1]
        == "stopped; out.partial holds the work that is done, and the same command continues"
    )
