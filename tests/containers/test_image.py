"""The image is built by docker or podman, and its command prepares a corpus and trains.

The build downloads packages. BYTELOOM_BUILD_OPTIONS has options of the build, for a base image and an index of packages
of your own: `--build-arg BASE=… --build-arg PIP_OPTIONS=…`.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TAG = "byteloom-test"


def works(program: str) -> bool:
    """Return whether a program is installed and can run containers."""
    if shutil.which(program) is None:
        return False
    return subprocess.run([program, "info"], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def program() -> str:
    """Return docker or podman."""
    found = next((each for each in ("docker", "podman") if works(each)), None)
    if found is None:
        pytest.skip("neither docker nor podman can run containers here")
    return found


@pytest.fixture(scope="module")
def image(program: str) -> str:
    options = shlex.split(os.environ.get("BYTELOOM_BUILD_OPTIONS", ""))
    command = [program, "build", "--file", "containers/Dockerfile", "--tag", TAG, *options, "."]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    return TAG


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_image_prepares_a_corpus_and_trains(program: str, image: str, tmp_path: Path):
    def run(*words: object) -> str:
        command = [program, "run", "--rm", "--volume", f"{tmp_path}:/work", image, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    assert re.match(r"byteloom +0", run("--version"))
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / f"texts/{number}.txt").write_text(f"text number {number}\n" * 400)
    run("prepare", "texts", "--holdout", "0.1", "--out", "corpus")
    words = [
        "run.name=first",
        "data.shards=corpus/train",
        "train.steps=2",
        "train.global_batch=2",
        "optimizer.schedule.warmup_steps=0",
    ]
    run("train", "debug", *words, "train.micro_batch=1", "tracking.enabled=false")
    steps = [json.loads(line)["step"] for line in (tmp_path / "runs/first/metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 2


def test_containers_copy_all_that_an_installation_needs():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    packages = set(re.findall(r'"(\w+)\*"', re.search(r"include = (\[.*\])", (ROOT / "pyproject.toml").read_text())[1]))
    assert packages | {"pyproject.toml", "requirements.lock", "README.md", "configs"} <= kept
    assert all((ROOT / name).exists() for name in kept)
    recipe = (ROOT / "containers/byteloom.def").read_text()
    for argument in re.findall(r"(?m)^ARG (\w+)=", (ROOT / "containers/Dockerfile").read_text()):
        assert f"{{{{ {argument} }}}}" in recipe
