"""One rank that a supervisor looks after: `python -m launchers.rank ENTRY RECIPE`."""

import faulthandler
import os
import signal
import sys
from pathlib import Path

from launchers.local import run_in_process
from launchers.supervision.heartbeat import FOLDER, Heartbeat, stack_of

if __name__ == "__main__":
    # A request to stop waits until the loop listens, which unblocks them.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR2})
    rank = int(os.environ.get("RANK") or os.environ["SLURM_PROCID"])
    heartbeat = Heartbeat.of(os.environ, rank)
    heartbeat.beat("start")
    with stack_of(Path(os.environ[FOLDER]), rank).open("w") as stacks:
        faulthandler.register(signal.SIGQUIT, stacks, all_threads=True)
        code = run_in_process(sys.argv[1], Path(sys.argv[2]))
        heartbeat.end(code)
        sys.exit(code)
