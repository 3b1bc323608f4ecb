"""Work: the jobs of a stage, shared by processes that may come, go, be killed and change in number.

A job is claimed by locking its byte of the stage's lock file. The lock ends with the process, however it ends, and
another takes the job up from its beginning; a job is done when its result is there, whole, by one rename. So claims
only save time: were two processes to do one job, both would make the same result.

    Pool ── name of a stage ──▶ stdin ┐
                                      │ python -m data_pipeline.preparation.work OUT.partial
    Pool ◀── bytes, idle, error ───── ┘ stdout

A worker lives as long as its standard input is open, so none outlives the process that started it.
"""

import fcntl
import json
import logging
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from byteloom.core.packages import MissingPackageError
from byteloom.core.state_files import StateFileError
from byteloom.core.text import count
from data_pipeline.errors import CorpusError
from data_pipeline.preparation.gather import Gather
from data_pipeline.preparation.layout import Layout
from data_pipeline.preparation.plan import Plan
from data_pipeline.preparation.scatter import Scatter

REPORT_SECONDS = 0.1
POLL_SECONDS = 0.2
DEATHS = 3
"""Workers that may be killed without a job done between, before that is taken for a fault."""

logger = logging.getLogger(__name__)


class WorkerError(Exception):
    """A worker met an error that nobody expected; a note has the worker's traceback."""


class Stage(Protocol):
    """Jobs that can be done in any order, by anyone who has OUT.partial."""

    name: str
    sizes: list[int]
    """Bytes to work on of each job, about."""

    def done(self) -> set[int]:
        """The jobs that are done."""

    def is_done(self, job: int) -> bool: ...

    def do(self, job: int, folder: Path, progress: Callable[[int], None]) -> None:
        """Does a job, writing into an empty folder of its own first. Tells bytes as they are worked on."""


def stage_named(name: str, plan: Plan) -> Stage:
    return Scatter(plan) if name == Scatter.name else Gather(plan, Layout.load(plan.folder), ahead=True)


class Claims:
    """Who does which job. One object of a process for a file, at most: closing another would end its locks."""

    def __init__(self, path: Path) -> None:
        # Locks of single bytes of one file: core.locks, which uses flock, locks only whole files.
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)

    @contextmanager
    def claim(self, job: int) -> Iterator[bool]:
        """Whether the job is ours until the block ends."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, job)
        except (BlockingIOError, PermissionError):
            yield False
            return
        except OSError:  # a file system without locks: work may be done twice there, and does no harm
            yield True
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, job)

    def close(self) -> None:
        os.close(self._descriptor)


@contextmanager
def own_folder(folder: Path) -> Iterator[Path]:
    """A folder of this process in `folder`. What killed processes left of theirs there is removed first."""
    folder.mkdir(exist_ok=True)
    for other in folder.iterdir():
        _remove_if_dead(other)
    own = Path(tempfile.mkdtemp(prefix=f"{os.uname().nodename}-{os.getpid()}-", dir=folder))
    with (own / "alive.new").open("wb") as file:
        # Not core.locks: whoever looks for the dead must not create the file of a folder that is only just made.
        try:
            fcntl.lockf(file, fcntl.LOCK_EX)
            (own / "alive.new").rename(own / "alive")
        except OSError:  # without locks nobody can tell who is dead: the folder stays until all is finished
            pass
        try:
            yield own
        finally:
            shutil.rmtree(own, ignore_errors=True)


def _remove_if_dead(folder: Path) -> None:
    try:
        with (folder / "alive").open("rb+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        return


def do_what_is_left(stage: Stage, plan: Plan, begin: float, told: Callable[[int, int], None]) -> None:
    """Does the jobs that nobody has done or is doing.

    Args:
        begin: where in the list of jobs to begin, from 0 to 1.
        told: called with a job and the bytes worked on so far.
    """
    claims = Claims(plan.folder / f"{stage.name}.claims")
    done, jobs = stage.done(), len(stage.sizes)
    first = int(begin * jobs)
    with own_folder(plan.folder / "work") as own:
        for job in (number % jobs for number in range(first, first + jobs)):
            if job in done:
                continue
            with claims.claim(job) as is_ours:
                if is_ours and not stage.is_done(job):
                    with tempfile.TemporaryDirectory(dir=own, prefix="job-", ignore_cleanup_errors=True) as folder:
                        stage.do(job, Path(folder), _adding(job, told))
    claims.close()


def _adding(job: int, told: Callable[[int, int], None]) -> Callable[[int], None]:
    """Adds up the bytes of a job, and tells of them now and then."""
    total, last = 0, 0.0

    def add(size: int) -> None:
        nonlocal total, last
        total += size
        if time.monotonic() - last > REPORT_SECONDS:
            last = time.monotonic()
            told(job, total)

    return add


class Pool:
    """Workers of this machine; until they are started, and with one of them, this process itself.

    Args:
        folder: OUT.partial
        begin: where in each list of jobs they begin to look, from 0 to 1, and `until` where another task does.
    """

    def __init__(self, folder: Path, skip_bad: bool, workers: int, begin: float = 0.0, until: float = 1.0) -> None:
        self._folder, self._skip_bad = folder, skip_bad
        self._messages: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]] = queue.SimpleQueue()
        self._begins = [begin + (until - begin) * number / workers for number in range(workers)]
        self._workers = list[_Worker]()
        self._deaths = 0

    def start(self) -> None:
        """Starts the workers, unless they are. They wait for `run`, before which there need be no plan."""
        if not self._workers and len(self._begins) > 1:
            self._workers = [self._worker(place) for place in self._begins]

    def _worker(self, place: float) -> "_Worker":
        return _Worker(self._folder, self._skip_bad, place, self._messages)

    def run(self, plan: Plan, stage: Stage, progress: Callable[[int], None]) -> None:
        """Returns when every job of a stage is done, whoever did it, or when OUT.partial is gone.

        Args:
            progress: told the bytes worked on in this stage.

        Raises:
            CorpusError: what a job raised; or workers are killed again and again.
        """
        under_way: dict[object, tuple[int, int]] = {}  # of each worker, its job and the bytes of it

        def show() -> set[int]:
            done = stage.done()
            parts = {job: size for job, size in under_way.values() if job not in done}
            progress(sum(stage.sizes[job] for job in done) + sum(min(stage.sizes[j], n) for j, n in parts.items()))
            return done

        def told(job: int, size: int) -> None:
            under_way[self] = job, size
            show()

        left = len(stage.sizes)
        while left and (self._folder / "plan.json").exists():
            if self._workers:
                self._work(stage, under_way)
            else:
                do_what_is_left(stage, plan, self._begins[0], told)
            remaining = len(stage.sizes) - len(show())
            if remaining == left and not self._workers:
                time.sleep(POLL_SECONDS)  # others are doing them
            if remaining < left:
                self._deaths = 0
            left = remaining

    def _work(self, stage: Stage, under_way: dict[object, tuple[int, int]]) -> None:
        """Keeps all workers at the stage for POLL_SECONDS."""
        for worker in self._workers:
            worker.begin(stage.name)
        until = time.monotonic() + POLL_SECONDS
        while (seconds := until - time.monotonic()) > 0:
            try:
                worker, message = self._messages.get(timeout=seconds)
            except queue.Empty:
                return
            if message is None:
                self._replace(worker)
            elif "error" in message:
                raise CorpusError(message["error"])
            elif "crash" in message:
                failure = WorkerError(f"a worker failed: {message['crash']}")
                failure.add_note(message["traceback"])
                raise failure
            elif "warning" in message:
                logger.warning("%s", message["warning"])
            elif "bytes" in message:
                under_way[worker] = message["job"], message["bytes"]
            else:
                worker.is_idle = True
                under_way.pop(worker, None)
                if all(worker.is_idle for worker in self._workers):
                    return

    def _replace(self, worker: "_Worker") -> None:
        how = worker.ending()
        self._deaths += 1
        if self._deaths > DEATHS:
            raise CorpusError(
                f"workers ended {count(self._deaths, 'time')} without finishing a job, the last one {how}; perhaps "
                f"memory is short. {self._folder} holds the work that is done, and the same command continues"
            )
        logger.warning("a worker ended %s; another one repeats its work", how)
        self._workers.remove(worker)
        self._workers.append(self._worker(worker.place))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Killed rather than asked: whatever they are doing can be lost at any moment.
        for worker in self._workers:
            worker.kill()


class _Worker:
    """A process that works, as its pool sees it."""

    def __init__(self, folder: Path, skip_bad: bool, place: float, messages: "queue.SimpleQueue[Any]") -> None:
        self.place = place
        self.is_idle = True
        # Not multiprocessing, which would import the program's main module in each of them.
        package = Path(__file__).parents[2]
        path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
        arguments = [str(folder), str(place), str(int(skip_bad))]
        # Ctrl-C reaches the whole group; workers, which inherit what is blocked, are ended by their pool.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        self._process = subprocess.Popen(
            # -P: a folder named data_pipeline where the command was given is none of ours.
            [sys.executable, "-P", "-m", "data_pipeline.preparation.work", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        threading.Thread(target=self._listen, args=(messages,), daemon=True).start()

    def _listen(self, messages: "queue.SimpleQueue[Any]") -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith(b"\n"):
                messages.put((self, json.loads(line)))
        messages.put((self, None))

    def begin(self, stage: str) -> None:
        """Sets an idle worker to work."""
        if self.is_idle:
            self.is_idle = False
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(f"{stage}\n".encode())
                self._process.stdin.flush()
            except BrokenPipeError:  # it is dead, and `_listen` will say so
                pass

    def ending(self) -> str:
        """How a process that has closed its output came to its end."""
        code = self._process.wait()
        return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class _Teller(logging.Handler):
    """Sends a worker's warnings to its pool, which shows them."""

    def __init__(self, tell: Callable[..., None]) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(warning=record.getMessage())


def main() -> None:
    """A worker's life: see `_Worker`."""
    commands: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            commands.put(line.strip())
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    folder, place, skip_bad = sys.argv[1:]

    def tell(**message: object) -> None:
        print(json.dumps(message), flush=True)

    logging.getLogger("data_pipeline").addHandler(_Teller(tell))
    try:
        plan = None
        while True:
            name = commands.get()
            plan = plan or Plan.load(Path(folder), bool(int(skip_bad)))  # there is none before the first command
            stage = stage_named(name, plan)
            do_what_is_left(stage, plan, float(place), lambda job, size: tell(job=job, bytes=size))
            tell(idle=True)
    except (CorpusError, MissingPackageError, StateFileError, OSError) as error:
        tell(error=str(error))
    except Exception as error:
        tell(crash=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())


if __name__ == "__main__":
    main()
