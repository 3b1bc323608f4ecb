"""Home folders in paths."""

import getpass
from pathlib import Path

import pytest

from byteloom.core.storage.locations import expand_home


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def test_leading_tilde_expands_to_the_home_folder(home: Path):
    assert expand_home("~") == str(home)
    assert expand_home("~/runs/a b") == f"{home}/runs/a b"


def test_tilde_and_user_expand_to_the_home_folder_of_the_user():
    user = getpass.getuser()
    assert expand_home(f"~{user}/runs") == f"{Path(f'~{user}').expanduser()}/runs"


@pytest.mark.parametrize(
    "text", ["./~", "./~/runs", "a/~/b", "/~", "a~", "s3://~/bucket", "https://host/~user/corpus", ""]
)
def test_tilde_elsewhere_is_not_expanded(text: str):
    assert expand_home(text) == text


def test_unknown_user_is_refused_unless_a_file_has_that_name(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no home folder is known for ~nobody-here; .* \./~nobody-here/runs"):
        expand_home("~nobody-here/runs")
    (tmp_path / "~$report.docx").touch()
    assert expand_home("~$report.docx") == "~$report.docx"
