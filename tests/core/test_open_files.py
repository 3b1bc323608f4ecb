"""Files that a process keeps open for reading."""

import os
import signal
import threading
from pathlib import Path

from byteloom.core.storage.open_files import OPEN_FILES


def test_fork_opens_files_while_threads_of_its_parent_do(tmp_path: Path):
    path = tmp_path / "file"
    path.touch()
    owner, is_over = object(), threading.Event()

    def open_and_close() -> None:
        while not is_over.is_set():
            OPEN_FILES.open(owner, path)
            OPEN_FILES.close(owner, path)

    threads = [threading.Thread(target=open_and_close) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            if (process := os.fork()) == 0:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(60)  # kills a process that waits for a lock without end
                OPEN_FILES.open(owner, path)
                os._exit(0)
            assert os.waitpid(process, 0)[1] == 0
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
        OPEN_FILES.close(owner, path)
