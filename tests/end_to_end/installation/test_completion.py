"""Shell completion as a shell requests it."""

import subprocess

import pytest

from tests import commands
from tests.commands import BYTELOOM, environment


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("byteloom pre", ["prepare"]),
        ("byteloom checkpoint ve", ["verify"]),
        ("byteloom prepare --image-s", ["--image-size", "--image-scan"]),
        ("byteloom train perceiver_ar/deb", ["perceiver_ar/debug"]),
        ("byteloom status --js", ["--json"]),
    ],
)
def test_bash_completes_commands_recipes_and_options(words: str, expected: list[str]):
    assert completed(COMP_WORDS=words, COMP_CWORD=str(words.count(" "))) == expected


def test_completion_script_is_shown_without_a_running_shell():
    """`--show-completion` needs a shell among the parent processes, which a job or a container may not have."""
    variables_of_completion = {**environment(), "_BYTELOOM_COMPLETE": "source_bash"}
    shown = subprocess.run([BYTELOOM], capture_output=True, text=True, check=True, env=variables_of_completion).stdout
    assert "_BYTELOOM_COMPLETE=complete_bash" in shown


def completed(**variables: str) -> list[str]:
    variables_of_completion = {**environment(), "_BYTELOOM_COMPLETE": "complete_bash", **variables}
    return commands.run([], check=True, env=variables_of_completion, capture_output=True, text=True).stdout.split()
