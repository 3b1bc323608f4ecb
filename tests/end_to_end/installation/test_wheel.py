"""The wheel: installed without the checkout, its commands work in any folder with any content."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml

from launchers.supervision.record import LaunchRecord
from pretrain.config.loading import load
from tests import commands
from tests.conftest import STDLIB
from tests.test_project import ROOT

SOURCE = ("byteloom", "configs", "data_pipeline", "launchers", "pretrain", "pyproject.toml", "README.md", "LICENSE")
"""Files and folders from which a wheel is build_wheel."""
SMALL = (
    "train.steps=2",
    "train.global_batch=2",
    "train.micro_batch=2",
    "optimizer.schedule.warmup_steps=1",
    "engine.precision=fp32",
    "engine.device=cpu",
    "tracking.enabled=false",
)
LAUNCH_SECONDS = 240
"""Limit of a submitted run on a loaded machine."""

pytestmark = pytest.mark.timeout(900)
Command = Callable[..., subprocess.CompletedProcess[str]]


def build_wheel(source: Path | str, folder: Path, out: Path) -> Path:
    """Build a wheel with the tools of this environment; return its path."""
    pip = [sys.executable, "-m", "pip", "wheel", source, "--no-deps", "--no-index", "--no-build-isolation", "-w", out]
    done = subprocess.run(pip, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    for name in SOURCE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        options = {"symlinks": True, "ignore": shutil.ignore_patterns("__pycache__")} if copy is shutil.copytree else {}
        copy(ROOT / name, folder / name, **options)
    return build_wheel(".", folder, folder / "wheels")


def inherited() -> dict[str, str]:
    """Return the environment of commands, without variables that name other packages."""
    others = ("PYTHONPATH", "PYTHONSAFEPATH")
    return {name: value for name, value in commands.environment().items() if name not in others}


class WheelEnvironment:
    """Virtual environment with the wheel and with the packages of this environment except Byteloom's."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            folder / "bin/python",
            "install",
            "--no-deps",
            "--no-index",
            wheel,
        ]
        subprocess.run(pip, capture_output=True, check=True)
        [packages] = (folder / "lib").glob("python*/site-packages")
        # A path in a .pth file adds its packages but not its own .pth files, so no editable checkout.
        (packages / "dependencies.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")

    def run(
        self, command: str, *arguments: object, cwd: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [self.folder / "bin" / command, *map(str, arguments)],
            cwd=cwd,
            env={**inherited(), **(environment or {})},
            capture_output=True,
            text=True,
            errors="backslashreplace",
            check=False,
        )
        assert done.returncode == 0, f"{command} {' '.join(map(str, arguments))}:\n{done.stdout}\n{done.stderr}"
        return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> WheelEnvironment:
    return WheelEnvironment(tmp_path_factory.mktemp("environment") / "with space", wheel)


@pytest.fixture(scope="module")
def forked(installed: WheelEnvironment) -> Iterator[Command]:
    """Return a function that runs commands of the wheel as forks of one process, and returns what they print."""

    def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
        options = {"cwd": cwd, "text": True, "errors": "backslashreplace"}
        return commands.run(arguments, check=True, capture_output=True, env=inherited(), server=server, **options)

    with commands.warm(inherited(), python=installed.folder / "bin/python") as server:
        yield run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, installed: WheelEnvironment) -> Path:
    """Return a folder with a space in its name, and a small corpus at the path that the recipes use."""
    folder = tmp_path_factory.mktemp("elsewhere") / "my runs"
    folder.mkdir()
    sources = ("--include=json/*.py", "--include=email/*.py", "--holdout=0.2")
    installed.run("byteloom", "prepare", STDLIB, *sources, "--out=runs/corpora/stdlib", cwd=folder)
    return folder


def contents(wheel: Path, folder: Path) -> dict[str, bytes]:
    """Return the packages' files in a wheel."""
    shutil.unpack_archive(wheel, folder, "zip")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in files
        if "dist-info" not in path.relative_to(folder).parts[0]
    }


def test_wheel_holds_every_recipe_and_preset_also_when_built_from_an_sdist(wheel: Path, tmp_path: Path):
    held = contents(wheel, tmp_path / "held")
    recipes = {f"byteloom/{path.relative_to(ROOT)}": path.read_bytes() for path in (ROOT / "configs").rglob("*.yaml")}
    assert recipes.items() <= held.items()
    assert len(recipes) > 60
    sdist = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", sdist], cwd=wheel.parents[1], capture_output=True, check=True)
    again = build_wheel(next(tmp_path.glob("*.tar.gz")), tmp_path, tmp_path / "wheels")
    assert contents(again, tmp_path / "again") == held


def test_installed_commands_work_in_an_empty_folder(installed: WheelEnvironment, forked: Command, folder: Path):
    where = (
        "import byteloom, data_pipeline, launchers, pretrain; print(byteloom.__file__, pretrain.__file__, sep='\\n')"
    )
    for file in installed.run("python", "-P", "-c", where, cwd=folder).stdout.splitlines():
        assert Path(file).is_relative_to(installed.folder)

    trained = installed.run("byteloom", "train", "debug", *SMALL, cwd=folder)
    assert "finished at step 2; all files are in runs/debug" in trained.stderr
    source = json.loads((folder / "runs/debug/config.source.json").read_text())
    assert source.pop("sha256")
    assert source == {"recipe": "debug"}  # without a checkout there is no commit

    scored = forked("eval", "runs/debug", "runs/corpora/stdlib/validation", cwd=folder)
    assert "runs/corpora/stdlib/validation" in scored.stdout
    assert "8 bytes" in forked("generate", "runs/debug", "--bytes=8", cwd=folder).stderr

    listed = forked("models", cwd=folder).stdout
    assert all(f" {name} " in listed for name in ("debug", "megabyte/text", "perceiver_ar/pg19"))

    printed = forked("submit", "debug", "--cluster=gpu", "--nodes=2", "--dry-run", cwd=folder).stdout
    job = folder.resolve() / "runs/debug/jobs/001"
    script, _, rest = printed.partition("# The job looks after: ")
    srun, _, recipe = rest.partition("\n\n")
    assert f"folder={shlex.quote(str(job))}\n" in script
    python = str(installed.folder / "bin/python")
    assert f"\n{shlex.quote(python)} -u -m submitit.core._submit {shlex.quote(f'{job}/submitit')}\n" in script
    assert shlex.split(srun)[-6:] == [
        python,
        "-P",
        "-m",
        "launchers.rank",
        "pretrain.cli.train:start",
        f"{job}/config.yaml",
    ]
    assert yaml.safe_load(recipe)["run"]["name"] == "debug"
    assert not job.exists()


def test_copy_of_a_recipe_trains(forked: Command, folder: Path):
    forked("config", "new", "mine.yaml", "--from=debug", cwd=folder)
    first = (folder / "mine.yaml").read_text().partition("\n")[0]
    assert first == "# yaml-language-server: $schema=byteloom.schema.json"
    schema = json.loads((folder / "byteloom.schema.json").read_text())
    jsonschema.validate(load(folder / "mine.yaml").as_tree(), schema)
    trained = forked("train", "mine.yaml", *SMALL, cwd=folder)
    assert "finished at step 2; all files are in runs/mine" in trained.stderr
    assert json.loads((folder / "runs/mine/config.source.json").read_text())["recipe"] == str(folder / "mine.yaml")


def test_working_directory_is_not_imported_and_a_hanging_git_does_not_block(
    installed: WheelEnvironment, folder: Path, tmp_path: Path
):
    """A process started with `python -m` would otherwise import packages of the same names from there."""
    for name in ("byteloom", "configs", "data_pipeline", "launchers", "pretrain"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('this is not a package of Byteloom')")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/git").write_text("#!/bin/sh\nsleep 10000\n")
    (tmp_path / "bin/git").chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}

    def run(*arguments: object) -> str:
        return installed.run("byteloom", *arguments, cwd=tmp_path, environment=environment).stderr

    run("prepare", STDLIB / "json", STDLIB / "email", "--include=*.py", "--workers=2", "--out=corpus")
    recipe = ("debug", *SMALL, f"data.shards={folder}/runs/corpora/stdlib/train")
    assert "finished at step 2" in run("train", *recipe, "run.name=two", "launch.processes=2")

    run("submit", *recipe, "run.name=job", "--cluster=local", "--processes-per-node=1")
    record, deadline = LaunchRecord(tmp_path / "runs/job"), time.monotonic() + LAUNCH_SECONDS
    while (last := record.read()[-1].event) not in ("finished", "gave_up"):
        assert time.monotonic() < deadline, last
        time.sleep(0.1)
    assert last == "finished", (tmp_path / "runs/job/jobs/001/batch.log").read_text()
    assert json.loads((tmp_path / "runs/job/config.source.json").read_text())["recipe"] == "debug"
