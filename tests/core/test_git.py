"""Recorded state of git repositories, and the deadline for git."""

import os
import shutil
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

from byteloom.core import provenance
from byteloom.core.git import Repository, ask_git
from byteloom.core.provenance import read_source, save_resolved, trace
from tests.test_project import ROOT

GIT = shutil.which("git")
PATIENCE_SECONDS = 60.0
pytestmark = pytest.mark.skipif(GIT is None, reason="git is not installed")


def git(folder: Path, *arguments: str) -> str:
    """Run git without the settings of this machine; return its output."""
    who = ["-c", "user.name=tester", "-c", "user.email=tester"]
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull}
    done = subprocess.run([GIT, *who, *arguments], cwd=folder, env=environment, capture_output=True, check=True)
    return done.stdout.decode().strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Make a repository with one commit, in a folder whose name has a space and is not UTF-8."""
    folder = tmp_path / os.fsdecode(b"caf\xe9 au lait")
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / ".gitignore").write_text("ignored.yaml\n")
    (folder / "recipe.yaml").write_text("run: {name: a}\n")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message=first")
    return folder


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let git answer late, on a busy machine."""
    monkeypatch.setattr(provenance, "ask_git", partial(ask_git, seconds=PATIENCE_SECONDS))


def tags(file: Path, tracked: bool = False) -> dict[str, str]:
    repository = Repository(file, tracked)
    ask_git([repository], PATIENCE_SECONDS)
    return repository.tags()


def fake_git(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a shell script the only git on PATH."""
    folder.mkdir()
    (folder / "git").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_tags_describe_the_repository_that_holds_the_file(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    commit = git(repository, "rev-parse", "HEAD")
    monkeypatch.chdir(ROOT)  # the working directory does not count
    monkeypatch.setenv("GIT_DIR", str(ROOT / ".git"))  # nor does a variable that a git hook sets
    assert tags(repository / "recipe.yaml", tracked=True) == {"git.commit": commit, "git.clean": "True"}
    (repository / "recipe.yaml").write_text("run: {name: b}\n")
    assert tags(repository / "recipe.yaml") == {"git.commit": commit, "git.clean": "False"}
    assert tags(tmp_path / "recipe.yaml") == {}


def test_untracked_and_ignored_files_have_no_repository(repository: Path):
    for name in ("new.yaml", "ignored.yaml"):
        (repository / name).write_text("run: {name: b}\n")
    assert tags(repository / "new.yaml")["git.clean"] == "False"
    assert tags(repository / "new.yaml", tracked=True) == {}
    assert tags(repository / "ignored.yaml") == {}


@pytest.mark.slow
def test_hanging_git_is_killed_at_the_deadline(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    started = tmp_path / "started"
    fake_git(tmp_path / "bin", f"echo $$ >> {started}\nsleep 1000", monkeypatch)
    repositories = [Repository(repository / "recipe.yaml"), Repository(Path(__file__), tracked=True)]
    ask_git(repositories, seconds=1.0)
    assert [each.tags() for each in repositories] == [{}, {}]
    for process in map(int, started.read_text().split() if started.exists() else ()):
        while Path(f"/proc/{process}").exists():
            time.sleep(0.01)


@pytest.mark.slow
def test_answers_of_a_slow_git_before_the_deadline_are_kept(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fake_git(tmp_path / "bin", f'case "$*" in *status*) sleep 1000;; *) exec {GIT} "$@";; esac', monkeypatch)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    slow = Repository(repository / "recipe.yaml")
    ask_git([slow], seconds=5.0)
    assert slow.tags() == {"git.commit": git(repository, "rev-parse", "HEAD")}


@pytest.mark.parametrize("script", [r"printf '\377\376\n'", "echo not-a-commit", "exit 128"])
def test_answer_that_is_not_a_commit_is_dropped(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
):
    fake_git(tmp_path / "bin", script, monkeypatch)
    assert tags(repository / "recipe.yaml") == {}


def test_no_tags_without_git_or_in_a_repository_of_another_user(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
        patch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # a variable of git's own test suite
        assert tags(repository / "recipe.yaml") == {}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tags(repository / "recipe.yaml") == {}


def test_recipe_and_byteloom_are_recorded_with_separate_commits(repository: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(repository)
    own = tags(ROOT / "byteloom/core/provenance.py", tracked=True)
    recipe_tags = {f"recipe.{name}": value for name, value in tags(repository / "recipe.yaml").items()}
    assert recipe_tags["recipe.git.clean"] == "True"
    path = os.fsencode(repository / "recipe.yaml").decode("utf-8", "backslashreplace")
    assert trace(Path("recipe.yaml")) == {"recipe": path, **recipe_tags, **own}
    debug = trace(ROOT / "configs/debug.yaml")
    assert debug == {"recipe": "debug", **{f"recipe.{name}": value for name, value in own.items()}, **own}


def test_resolved_recipe_keeps_its_source_until_it_changes(repository: Path, tmp_path: Path):
    source = trace(repository / "recipe.yaml")
    resolved = tmp_path / "config.yaml"
    save_resolved(resolved, "run: {name: a}\n", source)
    (repository / "recipe.yaml").write_text("run: {name: b}\n")
    assert read_source(resolved) == source
    assert trace(resolved) == source
    resolved.write_text("run: {name: c}\n")
    assert read_source(resolved) == {}
    assert trace(resolved)["recipe"] == str(resolved)


@pytest.mark.parametrize("content", [b"", b"\0\0\0\0", b"[]", b"{}", b"null", b'{"sha256": 3}', b"\xff\xfe"])
def test_damaged_source_file_is_ignored(tmp_path: Path, content: bytes):
    (tmp_path / "config.yaml").write_text("run: {name: a}\n")
    (tmp_path / "config.source.json").write_bytes(content)
    assert read_source(tmp_path / "config.yaml") == {}
