"""One rank of several: `python -m launchers ENTRY RECIPE`, started by local.py, whose end is its own."""

import os
import signal
import sys
import threading
from pathlib import Path

from launchers.local import run_in_process


def end_with_the_launcher() -> None:
    """Ends this process when the launcher, which holds the other end of standard input, is gone."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the loop listens: no traceback of whatever is imported
    threading.Thread(target=end_with_the_launcher, daemon=True).start()
    sys.exit(run_in_process(sys.argv[1], Path(sys.argv[2])))
