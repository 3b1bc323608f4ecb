"""Fixtures of all tests: real corpora made from Python's own library, recipes, and the real command."""

import gc
import os
import signal
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, settings

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.preparation.prepare import PrepareOptions, prepare
from data_pipeline.readers import ReadOptions
from data_pipeline.sources.listing import Selection
from pretrain.terminal import progress
from tests import commands

ROOT = Path(__file__).parent
STDLIB = Path(sysconfig.get_path("stdlib"))

LARGE_DOCUMENT = "header.py"
"""Document of 24 kB that `holdout` would put into the small part that is held out."""

Run = Callable[..., subprocess.CompletedProcess[str]]

LONG_FOLDERS = ("slurm", "end_to_end", "distributed", "launchers")
"""Folders of tests that start processes, with the files that take longest."""
START_EVENTS = ("subprocess.Popen", "os.fork", "os.posix_spawn", "socket.bind", "tests.server")
"""Audit events that --fast does not allow: events of Python, and the event of tests/s3.py."""


# A test has the same examples each time, and no time limit: a busy machine must not fail it.
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("random", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")
progress.QUIET_SECONDS = threading.TIMEOUT_MAX  # a busy machine would print progress between the lines that tests read


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of `make test-fast`."""
    help_text = "skip tests that start a process or a server, or that are marked slow"
    parser.addoption("--fast", action="store_true", help=help_text)


def pytest_configure(config: pytest.Config) -> None:
    """Let commands under test receive Ctrl-C; with --fast, skip a test when it starts a process or a server."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job and its children ignore it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--fast"):
        sys.addaudithook(_skip_if_test_starts_process)


def _skip_if_test_starts_process(event: str, arguments: tuple[object, ...]) -> None:
    """Skip the current test. A thread cannot skip a test, so threads may still start git."""
    is_in_test = "PYTEST_CURRENT_TEST" in os.environ and threading.current_thread() is threading.main_thread()
    if is_in_test and event in START_EVENTS:
        pytest.skip(f"--fast: {event}")


def pytest_collection_finish() -> None:
    """Exempt the objects made by imports from garbage collection, which is slow with torch's millions of objects."""
    gc.freeze()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip the folders of tests that start processes if --fast is given."""
    return True if config.getoption("--fast") and collection_path in [ROOT / name for name in LONG_FOLDERS] else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run long files first, so that no worker starts one when the others have finished."""
    items.sort(key=lambda item: item.path.relative_to(ROOT).parts[0] not in LONG_FOLDERS)
    if config.getoption("--fast"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def prepare_corpus(sources: Sequence[Path | str], out: Path, **options: object) -> Corpus:
    """Prepare a corpus in this process.

    Args:
        sources: files and folders to read.
        out: folder of the corpus.
        options: fields of PrepareOptions, Selection and ReadOptions.
    """
    prepare(sources, out, prepare_options(**options), lambda done, total: None)
    return Corpus(out)


def prepare_options(**options: object) -> PrepareOptions:
    selection, reading = (
        node(**{field.name: options.pop(field.name) for field in fields(node) if field.name in options})
        for node in (Selection, ReadOptions)
    )
    return PrepareOptions(selection=selection, reading=reading, **options)


@pytest.fixture(scope="session")
def sources() -> list[Path]:
    """Return folders with about 400 kB of real text in about forty files."""
    return [STDLIB / "json", STDLIB / "email"]


@pytest.fixture(scope="session")
def corpus_folder(sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a corpus of many small blocks in several shards, with a validation part of only 9 kB."""
    out = tmp_path_factory.mktemp("corpora") / "library"
    options = prepare_options(
        include=["*.py"], exclude=[LARGE_DOCUMENT], holdout=0.05, block_bytes=10_000, shard_bytes=40_000
    )
    prepare(sources, out, options, lambda done, total: None)
    return out


@pytest.fixture(scope="session")
def corpus(corpus_folder: Path) -> Corpus:
    return Corpus(corpus_folder / "train")


@pytest.fixture
def mixed(tmp_path: Path) -> Corpus:
    """Return a corpus of documents shorter and longer than a window and than a block, with every byte value."""
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    for number, length in enumerate((1, 31, 32, 33, 64, 500, 2000)):
        (tree / "sub" / f"{number}").write_bytes(np.random.default_rng(number).bytes(length))
    (tree / "all").write_bytes(bytes(range(256)))
    return prepare_corpus([tree], tmp_path / "corpus", block_bytes=300)


def train_once(folder: Path, corpus_folder: Path) -> Path:
    """Train the recipe of `recipe_tree` in a folder with a new command; return the run's folder."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_tree(corpus_folder)), encoding="utf-8")
    commands.run(["train", recipe], cwd=folder, check=True, stderr=subprocess.DEVNULL)
    return folder / "runs/run"


@pytest.fixture
def byteloom(tmp_path: Path) -> Run:
    """Return a function that runs a command in a new process in the test's folder and returns its output."""

    def run(
        *arguments: object, cwd: Path = tmp_path, env: Mapping[str, str] | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        variables = {**commands.environment(), **(env or {})}
        done = commands.run(arguments, env=variables, cwd=cwd, capture_output=True, text=True)
        if check and done.returncode:
            raise AssertionError(
                f"byteloom {' '.join(map(str, arguments))} ended with {done.returncode}:\n{done.stderr}"
            )
        return done

    return run


@pytest.fixture
def recipe(tmp_path: Path, corpus_folder: Path) -> Path:
    """Return a recipe of twelve steps in fp32, with a model of a few thousand parameters, dropout and no tracker."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_tree(corpus_folder)), encoding="utf-8")
    return path


def two_stages(length: int = 128) -> dict[str, object]:
    """Return the section `model` of a small H-Net of two stages, with a head for the byte after the next."""
    patcher = {"name": "learned", "size": 2.0}
    stage = {"width": 16, "heads": 2, "encoder": "m1", "decoder": "T1", "window": 16, "patcher": patcher}
    return {
        "family": "hnet",
        "sequence_length": length,
        "stages": [stage | {"patches": length * 3 // 4}, stage | {"width": 24, "patches": length // 3}],
        "main": {"width": 32, "heads": 2, "layers": "T1"},
        "mamba": {"head_width": 8, "state": 4, "chunk": 16},
        "multi_byte": {"heads": 2},
        "dropout": 0.1,
    }


def recipe_tree(corpus_folder: Path) -> dict[str, object]:
    return {
        "run": {"name": "run"},
        "data": {"shards": str(corpus_folder / "train"), "lanes": 8},
        "validation": {"shards": str(corpus_folder / "validation"), "every": 6},
        "model": {
            "family": "megabyte",
            "sequence_length": 128,
            "patch_size": 4,
            "global_model": {"width": 32, "layers": 2, "heads": 2},
            "local_model": {"width": 16, "layers": 2, "heads": 2},
            "dropout": 0.1,
            "initial_std": 0.02,
        },
        "train": {"steps": 12, "global_batch": 6, "micro_batch": 4},
        "optimizer": {"learning_rate": 3e-3, "schedule": {"warmup_steps": 0}},
        "engine": {"precision": "fp32", "device": "cpu"},
        "checkpoint": {"every": 4},
        "tracking": {"enabled": False},
    }
