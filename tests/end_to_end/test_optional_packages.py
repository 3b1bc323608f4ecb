"""Packages that only some runs use: not imported without need, and named where they are missing."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.commands import environment
from tests.conftest import Run
from tests.hidden import without

OPTIONAL = {
    *("PIL", "aiohttp", "boto3", "botocore", "deepspeed", "matplotlib", "mlflow", "moto", "pyarrow", "s3fs"),
    *("soundfile", "soxr", "submitit", "webdataset"),
}


def modules_of(*arguments: str | Path) -> set[str]:
    """Return the modules that a command has imported when it is done."""
    script = (
        "import atexit, sys; atexit.register(lambda: print(*sys.modules)); from pretrain.cli.entry import main; main()"
    )
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def refused(byteloom: Run, *arguments: object, env: Mapping[str, str]) -> str:
    """Return the one line that a command ends with."""
    done = byteloom(*arguments, env=env, check=False)
    assert done.returncode == 1, done.stderr
    [line] = done.stderr.splitlines()
    return line


def test_a_training_run_imports_no_package_that_it_does_not_use(recipe: Path, tmp_path: Path):
    loaded = modules_of("train", recipe, f"run.root={tmp_path}", "train.steps=2")
    assert "torch" in loaded
    assert not OPTIONAL & loaded


def test_prepare_of_text_imports_no_reader_of_media(sources: list[Path], tmp_path: Path):
    loaded = modules_of("prepare", sources[0], "--include", "*.py", "--out", tmp_path / "out", "--workers", "1")
    assert not (OPTIONAL | {"torch", "fsspec"}) & loaded


def test_a_run_goes_on_without_mlflow_and_its_numbers_are_delivered_later(byteloom: Run, recipe: Path, tmp_path: Path):
    hidden = without(tmp_path / "hook", *OPTIONAL)
    run = tmp_path / "runs/run"
    done = byteloom("train", recipe, "tracking.enabled=true", "train.steps=3", env=hidden)
    assert "warning: tracking.enabled needs mlflow: pip install 'mlflow" in done.stderr
    assert f"`byteloom track {Path('runs/run')}` sends them" in done.stderr
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3]
    [checkpoint] = (run / "checkpoints").iterdir()
    recorded = json.loads((checkpoint / "metadata.json").read_text())
    assert "'version.mlflow': 'none'" in str(recorded)
    assert "4 steps delivered" in byteloom("track", run).stderr


def test_zero_without_deepspeed_is_refused_by_name(byteloom: Run, recipe: Path, tmp_path: Path):
    hidden = without(tmp_path / "hook", "deepspeed")
    done = byteloom("train", recipe, "engine.name=zero1", "launch.processes=2", env=hidden, check=False)
    assert done.returncode == 1
    assert "error: engine.name zero1 needs deepspeed: pip install 'deepspeed" in done.stderr
    assert "Traceback" not in done.stderr
    versions = byteloom("--version", env=hidden).stdout.splitlines()
    assert [line.split()[0] for line in versions] == ["byteloom", "Python", "torch", "deepspeed", "accelerator"]
    assert versions[3].split(maxsplit=1)[1] == "not installed"


@pytest.mark.parametrize(
    ("name", "package", "fault", "workers"),
    [
        ("a.wav", "soundfile", "sound needs soundfile", 2),
        ("a.png", "PIL", "an image needs pillow", 1),
        ("a.parquet", "pyarrow", "a Parquet file needs pyarrow", 1),
    ],
    ids=["sound", "image", "Parquet"],
)
def test_a_missing_reader_is_a_fault_of_the_environment_and_not_of_the_file(
    byteloom: Run, tmp_path: Path, name: str, package: str, fault: str, workers: int
):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / name).write_bytes(bytes(1000))
    hidden = without(tmp_path / "hook", package)
    line = refused(byteloom, "prepare", "files", "--out", "out", "--skip-bad", "--workers", workers, env=hidden)
    assert line.startswith(f"error: {fault}: pip install '")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("url", "package"), [("s3://bucket/corpus", "s3fs"), ("https://host.invalid/corpus", "aiohttp")]
)
def test_a_url_without_its_package_is_refused_by_name(byteloom: Run, tmp_path: Path, url: str, package: str):
    hidden = without(tmp_path / "hook", package)
    for command in (["verify", url], ["prepare", url, "--out", "out"]):
        line = refused(byteloom, *command, env=hidden)
        assert line.startswith(f"error: {url} needs {package}: pip install '{package}")


def test_checkpoints_at_a_url_without_its_package_are_refused_by_name(byteloom: Run, recipe: Path, tmp_path: Path):
    hidden = without(tmp_path / "hook", "s3fs")
    line = refused(byteloom, "train", recipe, "checkpoint.home=s3://bucket/runs", env=hidden)
    assert line.startswith("error: s3://bucket/runs/run needs s3fs: pip install 's3fs")


def test_a_submission_without_submitit_is_refused_by_name_and_leaves_nothing(
    byteloom: Run, recipe: Path, tmp_path: Path
):
    hidden = without(tmp_path / "hook", "submitit")
    line = refused(byteloom, "submit", recipe, "--cluster", "local", env=hidden)
    assert line.startswith("error: a submission needs submitit: pip install 'submitit")
    assert not (tmp_path / "runs").exists()
