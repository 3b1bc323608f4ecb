"""One rank of several: `python -m launchers ENTRY RECIPE`. It ends when local.py, which started it, ends."""

import os
import signal
import sys
import threading
from pathlib import Path

from launchers.entry import run_watched


def end_with_the_launcher() -> None:
    """End this process when standard input closes, because the launcher that holds the other end has ended."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import before the loop handles signals
    threading.Thread(target=end_with_the_launcher, daemon=True).start()
    sys.exit(run_watched(sys.argv[1], Path(sys.argv[2])))
