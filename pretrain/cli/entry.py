"""Entry point of the `byteloom` command.

The imports at the top of this file are fast, so that Ctrl-C finds `quiet_interrupts` in place and prints no traceback.
`pretrain.cli.app` imports the module of a command when it runs. Help, and commands of corpora and of runs, import no
model and no engine, which take seconds to import.
"""

from byteloom.core.packages import long_lived_imports, quiet_interrupts
from byteloom.core.storage.open_files import raise_open_file_limit
from byteloom.core.text import escape_unknown_characters


def main() -> None:
    """Run the command; report a failed import like its other errors."""
    raise_open_file_limit()
    escape_unknown_characters()
    with quiet_interrupts(), long_lived_imports():
        from pretrain.terminal.console import run  # noqa: PLC0415 - imports take time
    run(_command)


def _command() -> None:
    with quiet_interrupts(), long_lived_imports():
        from pretrain.cli.app import app  # noqa: PLC0415 - imports take time
    app()


if __name__ == "__main__":
    main()
