"""The list of commands: what it says of each, and what help and light commands import."""

import subprocess
import sys
from collections.abc import Sequence

import pytest
import typer
from typer.testing import CliRunner

from pretrain.cli.app import PANELS, app
from pretrain.cli.lazy import LazyCommand

COMMANDS = [command for commands in PANELS.values() for command in commands]
HEAVY = {"torch", "mlflow", "deepspeed", "matplotlib"}
REPORT_IMPORTS = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
RUN_COMMAND = "from pretrain.cli.entry import main; main()"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_summary_in_the_list_is_the_first_line_of_the_help(command: LazyCommand):
    loaded = command.load()
    assert (loaded.help or "").partition("\n")[0] == command.help


def test_every_command_of_a_module_is_in_the_list():
    listed = {(command.module, command.name) for command in COMMANDS}
    for module in {command.module for command in COMMANDS}:
        own = typer.main.get_group(sys.modules[module].app)
        if own.callback is None and own.help is None:
            assert {(module, name) for name in own.commands} <= listed


def test_list_of_commands_has_every_panel_and_summary():
    shown = " ".join(CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output.split())
    for panel, commands in PANELS.items():
        assert panel in shown
        for command in commands:
            assert f"{command.name} {command.help}" in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["prepare", "--help"], ["status", "nowhere"], ["top", "nowhere"]],
    ids=" ".join,
)
def test_light_commands_import_no_torch(arguments: Sequence[str]):
    words = [sys.executable, "-c", REPORT_IMPORTS + RUN_COMMAND, *arguments]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    loaded = set(done.stderr.split())
    assert "pretrain.cli.app" in loaded
    assert not HEAVY & loaded
