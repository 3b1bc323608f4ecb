"""Work: the jobs of a stage, shared by processes that may be killed and whose number may change.

A process claims a job by locking its byte of the stage's lock file. The lock ends with the process, however it ends,
and another process then does the job from its start. A job is done when one rename has published its result. Claims
only save time: two processes that did one job would make the same result.

    Pool ── name of a stage ──▶ stdin ┐
                                      │ python -m data_pipeline.preparation.worker OUT.partial
    Pool ◀── bytes, idle, error ───── ┘ stdout

A worker ends when its standard input is closed, so none outlives the process that started it.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from byteloom.core.text import count
from data_pipeline.errors import CorpusError
from data_pipeline.preparation.plan import Plan

REPORT_SECONDS = 0.1
JOB_POLL_SECONDS = 0.2
DEATHS = 3
"""Number of workers that may be killed before one of them has done a job. One more ends the work."""

logger = logging.getLogger(__name__)


class WorkerError(Exception):
    """A worker failed with an unexpected error. A note has the worker's traceback."""


class WorkStage(Protocol):
    """Jobs that any process with access to OUT.partial can do, in any order."""

    name: str
    """Name of the stage."""
    sizes: list[int]
    """Approximate bytes of work of each job."""

    def done(self) -> set[int]:
        """Return the jobs that are done."""

    def is_done(self, job: int) -> bool:
        """Return whether a job is done."""

    def do(self, job: int, folder: Path, progress: Callable[[int], None]) -> None:
        """Do a job.

        Args:
            job: number of the job.
            folder: an empty folder for files that are not complete.
            progress: called with numbers of bytes, as they are done.
        """


class Claims:
    """Locks on the jobs of a stage.

    A process may have only one object for a file: closing a second one would end the locks of the first.
    """

    def __init__(self, path: Path) -> None:
        # Locks of single bytes of one file: core.locks, which uses flock, locks only whole files.
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)

    @contextmanager
    def claim(self, job: int) -> Iterator[bool]:
        """Try to lock a job for the block; yield whether this process has it."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, job)
        except (BlockingIOError, PermissionError):
            yield False
            return
        except OSError:  # a file system without locks: work may be done twice there, without harm
            yield True
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, job)

    def close(self) -> None:
        """End all locks."""
        os.close(self._descriptor)


@contextmanager
def own_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder of this process in `folder`, after removing the folders of processes that were killed."""
    folder.mkdir(exist_ok=True)
    for other in folder.iterdir():
        _remove_if_dead(other)
    own = Path(tempfile.mkdtemp(prefix=f"{os.uname().nodename}-{os.getpid()}-", dir=folder))
    with (own / "alive.new").open("wb") as file:
        # Not core.locks: whoever looks for the dead must not create the file of a folder that is only just made.
        try:
            fcntl.lockf(file, fcntl.LOCK_EX)
            (own / "alive.new").rename(own / "alive")
        except OSError:  # without locks nobody knows which process is dead: the folder stays until the end
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


def do_what_is_left(stage: WorkStage, plan: Plan, begin: float, report: Callable[[int, int], None]) -> None:
    """Do the jobs that no process has done or is doing.

    Args:
        stage: the stage.
        plan: the plan.
        begin: where in the list of jobs to begin, from 0 to 1.
        report: called with a job and the bytes of it that are done.
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
                        stage.do(job, Path(folder), _adding(job, report))
    claims.close()


def _adding(job: int, report: Callable[[int, int], None]) -> Callable[[int], None]:
    """Return a function that adds up the bytes of a job and calls `report` from time to time."""
    total, last = 0, 0.0

    def add(size: int) -> None:
        nonlocal total, last
        total += size
        if time.monotonic() - last > REPORT_SECONDS:
            last = time.monotonic()
            report(job, total)

    return add


class Pool:
    """Worker processes of this machine. Before they are started, and if there is only one, this process does the work.

    Args:
        folder: OUT.partial
        skip_bad: see PrepareOptions.
        workers: number of workers.
        begin: where in each list of jobs the first worker begins, from 0 to 1.
        until: where in each list of jobs another task begins, from 0 to 1.
    """

    def __init__(self, folder: Path, skip_bad: bool, workers: int, begin: float = 0.0, until: float = 1.0) -> None:
        self._folder, self._skip_bad = folder, skip_bad
        self._messages: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]] = queue.SimpleQueue()
        self._begins = [begin + (until - begin) * number / workers for number in range(workers)]
        self._workers = list[_Worker]()
        self._deaths = 0

    def start(self) -> None:
        """Start the workers, unless they run already. They wait for `run`; until then a plan is not needed."""
        if not self._workers and len(self._begins) > 1:
            self._workers = [self._worker(place) for place in self._begins]

    def _worker(self, place: float) -> "_Worker":
        return _Worker(self._folder, self._skip_bad, place, self._messages)

    def run(self, plan: Plan, stage: WorkStage, progress: Callable[[int], None]) -> None:
        """Work until this and other processes have done all jobs of a stage, or OUT.partial is removed.

        Args:
            plan: the plan.
            stage: the stage.
            progress: called with the bytes of this stage that are done.

        Raises:
            CorpusError: a job failed, or several workers were killed.
            WorkerError: a worker failed with an unexpected error.
        """
        under_way: dict[object, tuple[int, int]] = {}  # for each worker, its job and the bytes that are done

        def show() -> set[int]:
            done = stage.done()
            parts = {job: size for job, size in under_way.values() if job not in done}
            progress(sum(stage.sizes[job] for job in done) + sum(min(stage.sizes[j], n) for j, n in parts.items()))
            return done

        def report(job: int, size: int) -> None:
            under_way[self] = job, size
            show()

        left = len(stage.sizes)
        while left and (self._folder / "plan.json").exists():
            if self._workers:
                self._work(stage, under_way)
            else:
                do_what_is_left(stage, plan, self._begins[0], report)
            remaining = len(stage.sizes) - len(show())
            if remaining == left and not self._workers:
                time.sleep(JOB_POLL_SECONDS)  # other processes are doing the jobs
            if remaining < left:
                self._deaths = 0
            left = remaining

    def _work(self, stage: WorkStage, under_way: dict[object, tuple[int, int]]) -> None:
        """Let all workers work on the stage for JOB_POLL_SECONDS."""
        for worker in self._workers:
            worker.begin(stage.name)
        until = time.monotonic() + JOB_POLL_SECONDS
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
        # No orderly end is needed: workers may be killed at any moment.
        for worker in self._workers:
            worker.kill()


class _Worker:
    """Worker process, as its pool sees it."""

    def __init__(self, folder: Path, skip_bad: bool, place: float, messages: "queue.SimpleQueue[Any]") -> None:
        self.place = place
        self.is_idle = True
        # multiprocessing would import the program's main module in each worker.
        package = Path(__file__).parents[2]
        path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
        arguments = [str(folder), str(place), str(int(skip_bad))]
        # Ctrl-C reaches the whole process group. Workers inherit the blocked signal, and their pool ends them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        self._process = subprocess.Popen(
            # -P: do not import a folder named data_pipeline in the working folder.
            [sys.executable, "-P", "-m", "data_pipeline.preparation.worker", *arguments],
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
        """Send an idle worker the name of a stage."""
        if self.is_idle:
            self.is_idle = False
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(f"{stage}\n".encode())
                self._process.stdin.flush()
            except BrokenPipeError:  # the worker is dead, and `_listen` reports it
                pass

    def ending(self) -> str:
        """Return how a process that has closed its output ended."""
        code = self._process.wait()
        return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"

    def kill(self) -> None:
        """Kill the process and wait for its end."""
        self._process.kill()
        self._process.wait()
