"""Where the `byteloom` command begins. What makes corpora or looks after runs needs no model, whose libraries take
seconds to import."""

import sys

from data_pipeline.errors import CorpusError
from launchers.cluster import ClusterError
from launchers.scheduler import SchedulerError
from pretrain import corpus_commands, run_commands
from pretrain.console import run
from pretrain.run_folder import RunFolderError


def main() -> None:
    """Runs the command."""
    apps = (corpus_commands.app, run_commands.app)
    command = sys.argv[1] if sys.argv[1:] else None
    quick = [app for app in apps if command in {registered.name for registered in app.registered_commands}]
    if quick:
        run(quick[0], (ClusterError, CorpusError, RunFolderError, SchedulerError))
    else:
        from pretrain import cli  # noqa: PLC0415 - those libraries

        cli.main()


if __name__ == "__main__":
    main()
