"""Bring random faults on one submitted run for an hour, and check that it trains as if nothing had happened.

    python -m tests.slurm.soak --minutes 60 --seed 1
    python -m tests.slurm.soak --once               each fault once, in the order of the table

A run of two ranks on two of the four nodes of a real Slurm cluster, with checkpoints on an S3 server and a small disk
for its folder, meets one fault after another: soak_faults.py has them. Each fault comes once before any comes twice.
The fault of a round, its victim, its duration and the steps before it are a function of the seed and the round. When
the time is over, the run is cancelled, submitted with its last step, and trained to its end. Then it must have the
metrics of an uninterrupted run, each step once in metrics.jsonl and in MLflow, and a true status, and nothing may be
left behind.

The nodes have networks of their own, whose links can be cut, and the S3 server is in the controller's. A table at the
end has what was done about each fault, and the time to the next step: since the fault was over, and without waits. A
wait is Slurm's, from the request to requeue the job until its next start, or the recipe's: a limit of silence, a pause.
The table says how busy the machine was before: only a quiet machine gives the times.
"""

import argparse
import itertools
import json
import logging
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.preparation.prepare import prepare
from pretrain.training.run_status import RunStatus, status_of, statuses_of
from tests import commands
from tests.conftest import STDLIB, prepare_options, recipe_tree
from tests.end_to_end.runs.test_tracking import delivered, journal
from tests.s3 import FaultyS3, faulty_proxy, s3_client, s3_server
from tests.slurm.cluster import CONTROLLER_ADDRESS, Cluster, running_cluster, wait_until
from tests.slurm.soak_faults import RANKS, SIGNAL_SECONDS, SOAK_FAULTS, SOAK_NODES, TIME_MINUTES, SoakTarget
from tests.slurm.submitted import COMPARED_METRICS, SubmittedRun, assert_trained_as, byteloom

BUCKET = "soak"
SAVED_EVERY, VALIDATED_EVERY = 5, 50
ENDLESS = 100_000_000
"""Steps of the run until its end is known."""
DISK_BYTES = 128 << 20
TAIL = 1 << 15
"""Bytes at the end of the metrics that hold several lines."""
QUIET_LOAD = 0.5
"""Load of a machine on which nothing else runs."""
LIMITS = {
    "start_seconds": 600,
    "step_seconds": 20,
    "evaluation_seconds": 60,
    "checkpoint_seconds": 180,
    "pause_seconds": 5,
    "faults_of_node": 1_000_000,  # an hour of killed ranks would exclude every node
}


@dataclass(frozen=True)
class Recovery:
    """What one fault cost."""

    fault: str
    seconds: float
    """Time from the end of the fault to the next step."""
    own_seconds: float
    """The same, without the waits of Slurm and of the recipe."""
    repeated: int
    """Steps done again."""
    starts: int
    done: str
    """Events of the launch record, with the classes of failures."""

    def __str__(self) -> str:
        own = f" ({self.own_seconds:.1f} s without waits)" if self.own_seconds < self.seconds else ""
        return f"next step after {self.seconds:.1f} s{own}, {self.repeated} steps done again; {self.done}"


class StepWatch:
    """Thread that notes the steps of a run with the time at which they were seen."""

    def __init__(self, metrics: Path) -> None:
        self._metrics = metrics
        self.seen: list[tuple[float, int]] = []
        """Time and step."""
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            line = last_line(self._metrics)
            if line is not None and (not self.seen or self.seen[-1][1] != line["step"]):
                self.seen.append((time.time(), line["step"]))
            time.sleep(0.1)

    def highest(self, begin: float, end: float) -> int:
        """Return the highest step that was done between two times."""
        recent = self.seen[-10_000:]
        before = [step for at, step in recent if at <= begin][-1:]
        return max([*before, *(step for at, step in recent if begin < at <= end)], default=0)


def last_line(metrics: Path) -> dict[str, Any] | None:
    """Return the last whole line of a run's metrics."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read().split(b"\n")[:-1]
        return dict(json.loads(lines[-1])) if lines else None
    except (FileNotFoundError, json.JSONDecodeError):  # not begun; cut while it was read
        return None


class Soak:
    """Rounds of faults against one run.

    Args:
        target: the run.
        seed: seed of all choices.
        is_shuffled: whether the faults come in random order, and not in that of their table.
    """

    def __init__(self, target: SoakTarget, seed: int, *, is_shuffled: bool = True) -> None:
        self.target, self.run = target, target.run
        self._seed, self._is_shuffled = seed, is_shuffled
        self._metrics = self.run.folder / "metrics.jsonl"
        self._watch = StepWatch(self._metrics)

    def fault_of(self, number: int) -> str:
        """Return the fault of a round: of a shuffled deck of all faults, or of their table."""
        deck = list(SOAK_FAULTS)
        if self._is_shuffled:
            random.Random(f"{self._seed}, deck {number // len(deck)}").shuffle(deck)
        return deck[number % len(deck)]

    def run_round(self, number: int) -> Recovery:
        """Bring one fault on the run, and wait until it trains again."""
        choice, name = random.Random(f"{self._seed}, round {number}"), self.fault_of(number)
        # Two faults with the same checkpoint would count as a failure of the code.
        saved = self._checkpoint() + SAVED_EVERY
        steps = saved + choice.randrange(2 * SAVED_EVERY)
        self.target.wait(lambda: self._step() >= steps and self._checkpoint() >= saved, f"step {steps}")
        restarts, at = self._restarts(), time.time()
        print(f"{number:4d}  {name}, at step {self._step()} on {','.join(self.target.nodes)}", flush=True)
        over = SOAK_FAULTS[name].bring(self.target, choice)
        self.target.wait(lambda: self._next_step(name, at, over) is not None, f"a step after: {name}")
        recovery = self._recovery(name, at, over, restarts)
        print(f"      {recovery}", flush=True)
        self.target.all_nodes()
        self._check_status()
        return recovery

    def _step(self) -> int:
        line = last_line(self._metrics)
        return line["step"] if line else 0

    def _checkpoint(self) -> int:
        return status_of(self.run.folder).checkpoint_step or 0

    def _restarts(self) -> int:
        return int(self.target.job_field("Restarts"))

    def _begin(self, at: float, over: float) -> float:
        """Return the time after which a step is one after the fault."""
        return max([over, *(start.time for start in self.target.starts(at))])

    def _next_step(self, name: str, at: float, over: float) -> float | None:
        """Return the time of the first step after a fault; None before it."""
        if SOAK_FAULTS[name].has_restart and not self.target.starts(at):
            return None
        begin, line = self._begin(at, over), last_line(self._metrics)
        if line is None or line["time"] <= begin:
            return None
        lines = self._metrics.read_text().splitlines()
        times = (json.loads(each)["time"] for each in reversed(lines[:-1]))
        return float(min([line["time"], *itertools.takewhile(lambda at: at > begin, times)]))

    def _recovery(self, name: str, at: float, over: float, restarts: int) -> Recovery:
        seconds = (self._next_step(name, at, over) or over) - over
        starts = self.target.starts(at)
        waits = sum(float(LIMITS[wait]) for wait in SOAK_FAULTS[name].waits)
        if self._restarts() > restarts:
            waits += self._wait_of_slurm(at, over)
        repeated = self._watch.highest(at, starts[0].time) - (starts[0].step or 0) if starts else 0
        done = [
            f"{launch.event.replace('_', ' ')}{f' ({launch.fault})' if launch.fault else ''}"
            for launch in self.run.launches()
            if launch.time > at
        ]
        return Recovery(name, seconds, seconds - waits, max(repeated, 0), len(starts), ", ".join(done) or "nothing")

    def _wait_of_slurm(self, at: float, over: float) -> float:
        """Return the seconds in which a job that was returned to the queue waited for Slurm.

        They begin with the supervisor's request, or with the fault if Slurm acted by itself.

        Args:
            at: time before the fault.
            over: time at which the fault was over.
        """
        requests = [event.time for event in self.target.events("requeued", at)]
        began = time.mktime(time.strptime(self.target.job_field("StartTime"), "%Y-%m-%dT%H:%M:%S"))
        return max(0.0, began - max([over, *requests]))

    def _check_status(self) -> None:
        """Check that `status` is that of a run that trains."""
        before = self._step()

        def running() -> list[RunStatus]:
            return [each for each in statuses_of([self.run.folder]) if each.state == "running"]

        [status] = wait_until(running, "it runs", 60)
        assert (status.job, status.problems) == (self.run.job, [])
        assert before <= status.step <= self._step()

    def finish(self) -> int:
        """Stop the run, submit it with its last step, and wait for its end; return that step.

        It stops with a checkpoint: with another recipe, MLflow receives the steps after a checkpoint again.
        """
        at = time.time()
        self.target.slurm("scancel", "--signal=USR2", self.run.job)
        self.target.wait(lambda: self.target.events("requeued", at), "a stop with a checkpoint")
        byteloom(self.target.cluster, self.run.cwd, "cancel", self.run.folder)
        self.target.cluster.wait_for(self.run.job, "CANCELLED", seconds=120)
        steps = self._step() + SAVED_EVERY
        self.run.job = self.run.submit(self.run.folder, f"train.steps={steps}")
        self.target.wait(lambda: "finished" in self.run.events(), "the run has finished")
        self.target.cluster.wait_for(self.run.job, "COMPLETED", seconds=120)
        return steps


def write_soak_recipe(folder: Path) -> Path:
    """Write the recipe of a run without an end whose numbers do not depend on its length."""
    options = prepare_options(include=["*.py"], holdout=0.02)
    prepare([STDLIB / "json", STDLIB / "email"], folder / "corpus", options, lambda done, total: None)
    tree: dict[str, Any] = recipe_tree(folder / "corpus")
    tree["train"]["steps"] = ENDLESS
    tree["validation"]["every"] = VALIDATED_EVERY
    tree["optimizer"]["schedule"] |= {"shape": "constant"}
    tree["engine"]["name"] = "fsdp"
    tree["checkpoint"] = {"every": SAVED_EVERY, "home": f"s3://{BUCKET}/runs"}
    tree["tracking"] = {"enabled": True, "uri": f"sqlite:///{folder}/mlflow.db"}
    tree["supervise"] = LIMITS
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    (folder / "soak.yaml").write_text(f"signal_seconds: {SIGNAL_SECONDS}\n")
    return path


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a file system of its own; it must be there before the nodes are."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def servers_in_network(cluster: Cluster) -> Iterator[FaultyS3]:
    """Run the S3 server in the network of the nodes, which this process joins."""
    cluster.join_network()
    with s3_server(BUCKET), faulty_proxy(lambda path, credentials: None, CONTROLLER_ADDRESS) as proxy:
        yield proxy


def check_end(target: SoakTarget, steps: int) -> None:
    """Check the run's metrics against an uninterrupted run, its trackers and status, and that nothing is left."""
    run, folder = target.run, target.run.cwd
    plain = ("tracking.enabled=false", f"checkpoint.every={steps}", f"launch.processes={RANKS}")
    byteloom(target.cluster, folder, "train", "recipe.yaml", "run.name=reference", f"train.steps={steps}", *plain)
    assert_trained_as(run.folder, folder / "runs/reference", steps=steps)
    tracked, metrics = delivered(f"sqlite:///{folder}/mlflow.db")
    recorded = journal(run.folder)
    assert tracked.info.status == "FINISHED"
    assert {name: [step for step, _ in pairs] for name, pairs in metrics.items()} == {
        name: [step for step, _ in pairs] for name, pairs in recorded.items()
    }
    assert [metrics[name] for name in COMPARED_METRICS] == [recorded[name] for name in COMPARED_METRICS]
    status = status_of(run.folder)
    assert (status.state, status.step, status.checkpoint_step, status.problems) == ("finished", steps, steps, [])
    assert not target.slurm("squeue", "--noheader")
    wait_until(lambda: not ranks_left(target), "no rank is left", 60)
    assert not [path for path in run.folder.rglob("*.partial") if "heartbeats" not in path.parts]
    listed = s3_client().list_objects_v2(Bucket=BUCKET, Prefix="runs/soak/")["Contents"]
    committed = {each["Key"].rpartition("/")[0] for each in listed if "/step-" in each["Key"]}
    assert len(committed) <= 5, committed  # checkpoint.keep, the last good one, and one that may become good


def ranks_left(target: SoakTarget) -> list[int]:
    """Return the processes of jobs that are still there."""
    found = target.cluster.all_processes()
    return [pid for pid, words in found.items() if any(word.startswith("SLURM_JOB_ID=") for word in words)]


def print_table(recoveries: Sequence[Recovery], load: float) -> None:
    """Print what was done about each fault, with the median and the worst cost.

    Args:
        recoveries: of all rounds.
        load: of the machine before the first round.
    """
    by_fault = defaultdict[str, list[Recovery]](list)
    for each in recoveries:
        by_fault[each.fault].append(each)
    print("\n| fault | count | what is done | next step, s | without waits, s | steps done again |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in [name for name in SOAK_FAULTS if name in by_fault]:
        columns = [
            f"{statistics.median(values):{form}} ({max(values):{form}})"
            for form, values in (
                (".1f", [each.seconds for each in by_fault[name]]),
                (".1f", [each.own_seconds for each in by_fault[name]]),
                (".0f", [each.repeated for each in by_fault[name]]),
            )
        ]
        done = "; ".join(dict.fromkeys(each.done for each in by_fault[name]))
        print(f"| {name} | {len(by_fault[name])} | {done} | {' | '.join(columns)} |")
    state = "quiet" if load < QUIET_LOAD else "BUSY, so the times are too long"
    machine = f"{os.cpu_count()} cores, load {load:.1f} before the first round"
    print(f"\nEach time: median (worst). {machine}: {state}.", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Bring random faults on a submitted run, and check that it resumes.")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--once", action="store_true", help="bring each fault once, in the order of the table")
    arguments = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request of the S3 server
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # unmounts the disk
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"python -m tests.slurm.soak --seed {arguments.seed}, in {folder}", flush=True)
    recoveries: list[Recovery] = []
    load = os.getloadavg()[0]
    with (
        small_disk(folder / "runs") as disk,
        running_cluster(folder / "cluster", nodes=SOAK_NODES, network=True, grace=120) as cluster,
        servers_in_network(cluster) as proxy,
    ):
        os.environ["SLURM_CONF"] = cluster.environment["SLURM_CONF"]
        size = (f"--nodes={RANKS}", "--processes-per-node=1", "--cpus-per-process=1")
        options = (*size, f"--cluster={folder}/soak.yaml", "--partition=low", f"--time={TIME_MINUTES}")
        target = SoakTarget(cluster, SubmittedRun(cluster, write_soak_recipe(folder), "soak", *options), disk, proxy)
        soak = Soak(target, arguments.seed, is_shuffled=not arguments.once)
        end = time.monotonic() + 60 * arguments.minutes
        try:
            for number in itertools.count(arguments.first):
                recoveries.append(soak.run_round(number))
                if number + 1 == len(SOAK_FAULTS) if arguments.once else time.monotonic() > end:
                    break
        finally:
            print_table(recoveries, load)
        steps = soak.finish()
        check_end(target, steps)
    commands.default_server().end()
    left = cluster.all_processes()
    assert not left, left
    shutil.rmtree(folder)
    print(f"{len(recoveries)} faults in {steps} steps: the metrics of an uninterrupted run, and nothing left behind")


if __name__ == "__main__":
    main()
