"""Where the `byteloom` command begins. What makes corpora needs no model, whose libraries take seconds to import."""

import sys

from data_pipeline.errors import CorpusError
from pretrain import corpus_commands
from pretrain.console import run


def main() -> None:
    """Runs the command."""
    if sys.argv[1:] and sys.argv[1] in {command.name for command in corpus_commands.app.registered_commands}:
        run(corpus_commands.app, (CorpusError,))
    else:
        from pretrain import cli  # noqa: PLC0415 - those libraries

        cli.main()


if __name__ == "__main__":
    main()
