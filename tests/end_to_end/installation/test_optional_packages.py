"""Packages that only some runs use: not imported without need, and named when missing."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests import commands
from tests.commands import CommandServer, environment
from tests.conftest import Run
from tests.hidden import without

OPTIONAL = {
    *("PIL", "aiohttp", "boto3", "botocore", "deepspeed", "matplotlib", "mlflow", "moto", "pyarrow", "s3fs"),
    *("soundfile", "soxr", "submitit", "webdataset"),
    *("datasets", "huggingface_hub", "lm_eval", "transformers"),
}


def modules_of(*arguments: str | Path) -> set[str]:
    """Return the modules that a command has imported when it ends."""
    script = (
        "import atexit, sys; atexit.register(lambda: print(*sys.modules)); from pretrain.cli.entry import main; main()"
    )
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Mapping[str, str], CommandServer]]:
    """Return an environment without any optional package, and a server for its commands."""
    env = {**environment(), **without(tmp_path_factory.mktemp("hook"), *OPTIONAL)}
    with commands.warm(env) as server:
        yield env, server


@pytest.fixture
def bare_byteloom(bare: tuple[Mapping[str, str], CommandServer], tmp_path: Path) -> Run:
    """Return a function that runs a command without any optional package, in the test's folder."""
    env, server = bare

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return commands.run(arguments, env=env, server=server, cwd=tmp_path, capture_output=True, text=True)

    return run


def refusal(bare_byteloom: Run, *arguments: object) -> str:
    """Return the one line with which a command refuses."""
    done = bare_byteloom(*arguments)
    assert done.returncode == 1, done.stderr
    [line] = done.stderr.splitlines()
    return line


def test_training_imports_no_unused_package(recipe: Path, tmp_path: Path):
    loaded = modules_of("train", recipe, f"run.root={tmp_path}", "train.steps=2")
    assert "torch" in loaded
    assert not OPTIONAL & loaded


def test_prepare_of_text_imports_no_media_package(sources: list[Path], tmp_path: Path):
    loaded = modules_of("prepare", sources[0], "--include", "*.py", "--out", tmp_path / "out", "--workers", "1")
    assert not (OPTIONAL | {"torch", "fsspec"}) & loaded


def test_run_without_mlflow_continues_and_its_metrics_are_delivered_later(
    byteloom: Run, bare_byteloom: Run, recipe: Path, tmp_path: Path
):
    run = tmp_path / "runs/run"
    done = bare_byteloom("train", recipe, "tracking.enabled=true", "train.steps=3")
    assert "warning: tracking.enabled needs mlflow: pip install 'mlflow" in done.stderr
    assert f"`byteloom track {Path('runs/run')}` sends them" in done.stderr
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3]
    [checkpoint] = (run / "checkpoints").iterdir()
    recorded = json.loads((checkpoint / "metadata.json").read_text())
    assert "'version.mlflow': 'none'" in str(recorded)
    assert "4 steps delivered" in byteloom("track", run).stderr


def test_zero_without_deepspeed_names_the_missing_package(bare_byteloom: Run, recipe: Path):
    done = bare_byteloom("train", recipe, "engine.name=zero1", "launch.processes=2")
    assert done.returncode == 1
    assert "error: engine.name zero1 needs deepspeed: pip install 'deepspeed" in done.stderr
    assert "Traceback" not in done.stderr
    versions = bare_byteloom("--version").stdout.splitlines()
    assert [line.split()[0] for line in versions] == ["byteloom", "Python", "torch", "deepspeed", "accelerator"]
    assert versions[3].split(maxsplit=1)[1] == "not installed"


@pytest.mark.parametrize(
    ("name", "fault", "workers"),
    [
        ("a.wav", "sound needs soundfile", 2),
        ("a.png", "an image needs pillow", 1),
        ("a.parquet", "a Parquet file needs pyarrow", 1),
    ],
    ids=["sound", "image", "Parquet"],
)
def test_missing_reader_package_stops_prepare_instead_of_skipping_the_file(
    bare_byteloom: Run, tmp_path: Path, name: str, fault: str, workers: int
):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / name).write_bytes(bytes(1000))
    line = refusal(bare_byteloom, "prepare", "files", "--out", "out", "--skip-bad", "--workers", workers)
    assert line.startswith(f"error: {fault}: pip install '")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("url", "package"), [("s3://bucket/corpus", "s3fs"), ("https://host.invalid/corpus", "aiohttp")]
)
def test_url_without_its_package_names_the_missing_package(bare_byteloom: Run, url: str, package: str):
    for command in (["verify", url], ["prepare", url, "--out", "out"]):
        line = refusal(bare_byteloom, *command)
        assert line.startswith(f"error: {url} needs {package}: pip install '{package}")


def test_checkpoint_url_without_its_package_names_the_missing_package(bare_byteloom: Run, recipe: Path):
    line = refusal(bare_byteloom, "train", recipe, "checkpoint.home=s3://bucket/runs")
    assert line.startswith("error: s3://bucket/runs/run needs s3fs: pip install 's3fs")


def test_submission_without_submitit_names_the_package_and_leaves_no_files(
    bare_byteloom: Run, recipe: Path, tmp_path: Path
):
    line = refusal(bare_byteloom, "submit", recipe, "--cluster", "local")
    assert line.startswith("error: a submission needs submitit: pip install 'submitit")
    assert not (tmp_path / "runs").exists()
