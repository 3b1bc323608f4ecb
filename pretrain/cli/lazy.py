"""Commands whose modules are imported when they run, so that `byteloom --help` imports none of them."""

import importlib
import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from byteloom.core.packages import long_lived_imports, quiet_interrupts


class LazyCommand(TyperCommand):
    """Stand-in for a command or a group of commands in the list of commands."""

    def __init__(self, name: str, module: str, summary: str) -> None:
        """Make a stand-in.

        Args:
            name: word on the command line.
            module: module of `pretrain.cli` that has the command, alone or among others, in its `app`.
            summary: first line of the command's help.
        """
        super().__init__(name, help=summary, callback=None)
        self.module = f"pretrain.cli.{module}"

    def load(self) -> TyperCommand | TyperGroup:
        """Return the real command, and import its module if no command has yet."""
        if self.module not in sys.modules:
            with quiet_interrupts(), long_lived_imports():
                importlib.import_module(self.module)
        group = typer.main.get_group(sys.modules[self.module].app)
        found: TyperCommand | TyperGroup = group.commands.get(self.name or "", group)  # type: ignore[assignment]
        return found

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Return the context of the real command, which typer invokes in place of this one."""
        return self.load().make_context(info_name, args, parent, **extra)
