"""Worker process of a preparation: it does the jobs of a stage when its pool asks for them. See `work.Pool`."""

import json
import logging
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from byteloom.core.packages import MissingPackageError, long_lived_imports

with long_lived_imports():
    from byteloom.core.storage.state_files import StateFileError
    from data_pipeline.errors import CorpusError
    from data_pipeline.preparation.gather import Gather
    from data_pipeline.preparation.layout import Layout
    from data_pipeline.preparation.plan import Plan
    from data_pipeline.preparation.scatter import Scatter
    from data_pipeline.preparation.work import WorkStage, do_what_is_left


class _PoolHandler(logging.Handler):
    """Handler that sends a worker's warnings to its pool, which logs them."""

    def __init__(self, send: Callable[..., None]) -> None:
        super().__init__(logging.WARNING)
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send(warning=record.getMessage())


def _stage(name: str, plan: Plan) -> WorkStage:
    return Scatter(plan) if name == Scatter.name else Gather(plan, Layout.load(plan.folder), ahead=True)


def main() -> None:
    """Work until standard input is closed."""
    commands: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            commands.put(line.strip())
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    folder, place, skip_bad = sys.argv[1:]

    def send(**message: object) -> None:
        print(json.dumps(message), flush=True)

    logging.getLogger("data_pipeline").addHandler(_PoolHandler(send))
    try:
        plan = None
        while True:
            name = commands.get()
            plan = plan or Plan.load(Path(folder), bool(int(skip_bad)))  # there is none before the first command
            stage = _stage(name, plan)
            do_what_is_left(stage, plan, float(place), lambda job, size: send(job=job, bytes=size))
            send(idle=True)
    except (CorpusError, MissingPackageError, StateFileError, OSError) as error:
        send(error=str(error))
    except Exception as error:
        send(crash=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())


if __name__ == "__main__":
    main()
