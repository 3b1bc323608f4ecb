"""One rank that a supervisor looks after: `python -m launchers.rank ENTRY RECIPE`."""

import signal

if __name__ == "__main__":
    # A request to stop waits until the loop listens, which unblocks it. So nothing else is imported before this line.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR2})

import sys
from pathlib import Path

from launchers.entry import run_watched

if __name__ == "__main__":
    sys.exit(run_watched(sys.argv[1], Path(sys.argv[2])))
