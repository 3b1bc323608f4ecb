"""Supervisor of a submitted run: it starts the ranks, notices when they hang or end, and decides what follows.

    scheduler ─▶ supervise, on the job's first node ─▶ ranks        srun, or processes of this machine
                     │      ▲
                     │      └── heartbeats, the newest checkpoint, how the ranks ended
                     ▼
                 launches.jsonl; then start again, requeue, requeue without a node, or give up

It is a process of its own, so it outlives every rank. After a rank dies or hangs, the ranks are started again on the
same nodes. Only a request to stop, and a faulty node without a spare, send the job back to the queue. Slurm itself
requeues a job without spares that has lost a node; the supervisor of the next start finds out what happened. causes.py
lists the classes of failures. Before each start, the nodes check themselves.

The run folder may be full or out of reach for a while. The supervisor then waits until it can write its record.
"""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from byteloom.core.storage.files import replace_file
from byteloom.core.storage.locations import Url, locate
from byteloom.core.storage.state_files import StateFileError
from byteloom.core.storage.step_folders import MARKER, is_step_name, step_of
from byteloom.core.storage.urls import file_system
from byteloom.core.text import count
from launchers.supervision.causes import DEADLINES, PAUSED, Fault
from launchers.supervision.hangs import HangDetector
from launchers.supervision.heartbeat import probe, stack_of
from launchers.supervision.notices import Notices
from launchers.supervision.output import last_lines, output_of
from launchers.supervision.plan import LaunchPlan, heartbeats_of
from launchers.supervision.record import Event, Launch, LaunchRecord
from launchers.supervision.site import Ending, Ranks, Site
from launchers.supervision.slow_ranks import describe_slow_ranks, read_slow_ranks, write_slow_ranks

SUPERVISOR_POLL_SECONDS = 0.5
"""Time between two looks at the heartbeats of the ranks."""
ENDING_POLL_SECONDS = 0.05
"""Time between two looks whether the ranks have ended."""
TIME_LIMIT = "the time limit is near"
"""Reason for a request to stop that counts as an attempt."""
SCHEDULER_PAUSE_SECONDS = 2.0
"""Pause before the ranks start again after Slurm failed to start them. It doubles each time."""
LONGEST_PAUSE_SECONDS = 300.0
"""Longest pause before the ranks start again."""
SHORTEST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 5.0
"""Shortest and longest wait for a run folder that cannot be used."""
LOOK_SECONDS = 5.0
"""Time between two questions, in a pause, whether the job still runs."""
QUEUE_SECONDS, LAST_NOTICE_SECONDS = 2.0, 15.0
"""Time that the last notices have before the supervisor exits: of a job that is requeued, and of one that ends."""

log = logging.getLogger(__name__)

T = TypeVar("T")


class _PauseEndedError(Exception):
    """A pause cannot last until its end: the job is about to end, or the supervisor is asked to stop.

    Args:
        is_owned: whether the job still runs.
    """

    def __init__(self, *, is_owned: bool) -> None:
        super().__init__()
        self.is_owned = is_owned


class Supervisor:
    """Supervisor of one job of a run.

    Args:
        folder: folder of the submission, RUN/jobs/NUMBER.
        site: where the ranks run.
    """

    def __init__(self, folder: Path, site: Site) -> None:
        self.folder = folder
        self.site = site
        self.plan = LaunchPlan.load(folder / "plan.json")
        self.run = Path(self.plan.run)
        self.notices = Notices(self.plan.supervise.notify, self.run)
        self.record = LaunchRecord(self.run, self.notices.send)
        self._number = 0
        """Number of the current start."""
        self._has_waited = False
        """The run folder was not usable for some time since the current start."""
        self._have_ended = False
        """The ranks of the current start have ended, so that there will be no newer checkpoint."""
        self._last_step: list[int | None] = []
        """Step of the newest checkpoint of ranks that have ended, once it is known."""
        self._slow: set[str] = set()
        """Nodes whose slow ranks are on record for the current start."""

    def supervise(self) -> str:
        """Start the ranks until the run has finished, is requeued, or is given up; return the event that ended it."""
        event = ""
        try:
            event = self._supervise()
        except _PauseEndedError as ended:
            event = self._end_in_pause(is_owned=ended.is_owned)
        finally:
            self.notices.close(QUEUE_SECONDS if event == "requeued" else LAST_NOTICE_SECONDS)
        return event

    def _supervise(self) -> str:
        self._record_last_ending()
        while True:
            self._number = self._next_number()
            if (slow := self._slow_nodes()) and (outcome := self._exclude(slow)):
                return outcome
            unwanted = set(self._excluded()) & {*self.site.nodes, *self.site.spares}
            if unwanted and not self.site.leave(self._excluded()):
                return self._requeue(f"without {', '.join(sorted(unwanted))}")
            if outcome := self._examine():
                return outcome
            self._note("started")
            ending = self._watch(self._surely(self._start))
            self._have_ended = True
            if not self._is_newest():
                return "superseded"
            if outcome := self._after(ending):
                return outcome

    def _after(self, ending: Ending) -> str:
        """Return the event that ends the job; empty if the ranks are to be started again on its nodes."""
        if ending.kind == "finished":
            return self._note("finished").event
        if ending.kind == "stopped":
            return self._after_stop(ending)
        if not self.site.is_owned():
            return self._record_outside_ending(ending)
        return self._after_failure(ending)

    def _after_failure(self, ending: Ending) -> str:
        fault = self._fault_of(ending)
        node = ending.node if fault == "node" else ""
        self._note("failed", ending.reason, node, fault)
        if fault in PAUSED:
            return self._pause_after(fault, ending)
        if hopeless := self._hopeless():
            return self._give_up(hopeless, ending)
        if node and ending.is_lost and self.site.spares:
            return self._exclude({node: ending.reason})
        if node and self._faults(node) >= self.plan.supervise.faults_of_node:
            return self._exclude({node: f"{count(self._faults(node), 'failure')} began on {node}"})
        return ""

    def _examine(self) -> str:
        """Let the nodes check themselves, and exclude faulty ones; return the event that ends the job, or nothing."""
        found = self._surely(self.site.examine)
        if found.problem:
            return self._give_up(found.problem)
        if len(self.site.nodes) + len(self.site.spares) == 1:  # no other node shows whether the fault is the node's
            earlier = {launch.reason.partition(":")[0] for launch in self._excluded_since_a_start()}
            for reason in found.faults.values():
                if reason.partition(":")[0] in earlier:
                    return self._give_up(f"two nodes in a row fail the same check, so it is not theirs; {reason}")
        return self._exclude(found.faults) if found.faults else ""

    def _exclude(self, reasons: Mapping[str, str]) -> str:
        """Exclude nodes from the job. Return the event that ends it; empty if there are spares.

        Args:
            reasons: why, by node.
        """
        before = self.site.nodes
        is_enough = self.site.leave([*self._excluded(), *reasons])
        left = [node for node in before if node not in self.site.nodes]
        swaps = dict(zip(left, [node for node in self.site.nodes if node not in before], strict=True))
        for node, reason in reasons.items():
            swap = f"; {swaps[node]} takes its place" if node in swaps else ""
            self._note("excluded", f"{reason}{swap}", node, "node")
        return "" if is_enough else self._requeue(f"without {', '.join(reasons)}")

    def _fault_of(self, ending: Ending) -> Fault:
        """Return the class of a failure. A node is not to blame if the same happened on another one before.

        It is not to blame either where there is no other node: a rank that is killed there is a fault of the code.
        """
        if ending.fault != "node" or ending.is_lost:
            return ending.fault
        if not ending.node or not self.site.has_others:
            return "code"
        step = self._surely(self._newest_checkpoint)
        blamed = {launch.faulty for launch in self._in_vain() if launch.fault == "node" and launch.step == step}
        return "code" if blamed - {ending.node} else "node"

    def _pause_after(self, fault: Fault, ending: Ending) -> str:
        """Pause after a failure of a class in PAUSED; return the event that ends the job, or an empty string."""
        row = list[Launch]()
        """Failures of this class in a row, without a newer checkpoint."""
        for launch in self._of_job():
            if launch.event in ("failed", "stopped"):
                goes_on = bool(row) and (row[0].fault, row[0].step) == (launch.fault, launch.step)
                row = [*row, launch] if goes_on else [launch]
        if time.time() - row[0].time > DEADLINES.get(fault, float("inf")):
            failed = {"scheduler": "Slurm failed", "data": "the data could not be read"}[fault]
            return self._give_up(f"{failed} {count(len(row), 'time')} in a row: {ending.reason}", ending)
        if fault == "storage":
            self._surely(lambda: probe(self.heartbeats))
            if self._has_waited:  # the run folder could not be used, and can be now
                return ""
        first = SCHEDULER_PAUSE_SECONDS if fault == "scheduler" else self.plan.supervise.pause_seconds
        self._pause(min(LONGEST_PAUSE_SECONDS, first * 2 ** min(len(row) - 1, 10)))
        return ""

    def _pause(self, seconds: float) -> None:
        """Wait.

        Raises:
            _PauseEndedError: the job is not ours any more, or its time limit is near.
        """
        log.info("the next attempt is in %.0f s", seconds)
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if not self.site.is_owned():
                raise _PauseEndedError(is_owned=False)
            if self.site.seconds_left() < left:
                raise _PauseEndedError(is_owned=True)
            time.sleep(min(left, LOOK_SECONDS))

    def _end_in_pause(self, *, is_owned: bool) -> str:
        """Requeue the job if its time is over; return the event. The record is written only if it can be."""
        event: Event = "requeued" if is_owned else "stopped"
        reason = f"{TIME_LIMIT}, and storage or Slurm fails" if is_owned else self.site.why_stopped()
        with suppress(OSError, StateFileError):
            self._append(event, reason)
        if is_owned and (refusal := self.site.requeue(())):
            log.error("the job cannot be requeued: %s", refusal)
            return "gave_up"
        return event

    def _surely(self, action: Callable[[], T]) -> T:
        """Return the result of an action on the run folder. Wait, and repeat it, while its storage fails."""
        seconds = SHORTEST_WAIT_SECONDS
        while True:
            try:
                return action()
            except (OSError, StateFileError) as error:
                if not isinstance(error.__cause__ or error, OSError):
                    raise
                log.warning("the run folder cannot be used, so the supervisor waits: %s", error)
            self._has_waited = True
            self._pause(seconds)
            seconds = min(2 * seconds, LONGEST_WAIT_SECONDS)

    def _after_stop(self, ending: Ending) -> str:
        reason = f"{ending.reason}: {self.site.why_stopped()}"
        self._note("stopped", reason)
        if not self.site.is_owned():
            return "stopped"
        if hopeless := self._hopeless():
            return self._give_up(hopeless, ending)
        for node, clause in self._slow_nodes().items():
            self._note("excluded", clause, node, "node")
        return self._requeue(reason)

    def _hopeless(self) -> str:
        """Return why the run is not to be started again; empty if it is."""
        in_vain = [
            launch
            for launch in self._in_vain()
            # A preemption is not the run's fault.
            if (launch.reason.endswith(TIME_LIMIT) if launch.event == "stopped" else launch.fault in ("code", ""))
        ]
        if len(in_vain) < self.plan.supervise.attempts:
            return ""
        at = f"from step {in_vain[-1].step}" if in_vain[-1].step else "from the beginning"
        starts = count(len(in_vain), "start")
        advice = "; raise the time of a start, or save more often" if in_vain[-1].reason.endswith(TIME_LIMIT) else ""
        return f"{starts} {at} made no newer checkpoint; the last one ended with: {in_vain[-1].reason}{advice}"

    def _in_vain(self) -> list[Launch]:
        """Return the endings of the last starts that made no newer checkpoint."""
        in_vain: list[Launch] = []
        begun: int | None = None
        for launch in self._of_job():
            if launch.event == "started":
                begun = launch.step
            elif launch.event in ("failed", "stopped"):
                in_vain = [*in_vain, launch] if launch.step == begun else []
        return in_vain

    def _start(self) -> Ranks:
        self._has_waited = self._have_ended = False
        self._last_step = []
        write_slow_ranks(self.run, 0, [])  # those of the last start
        return self.site.start(self.plan, self.folder, f"start-{self._number}")

    def _watch(self, ranks: Ranks) -> Ending:
        """Wait until the ranks have ended; kill them if one hangs."""
        detector = HangDetector(self.heartbeats, ranks.size, self.plan.supervise, ranks.ask_where)
        self._slow = set()
        while (ending := _ending_of(ranks)) is None:
            if detector.has_hung():
                hang = detector.examine()
                ranks.kill()
                while _ending_of(ranks) is None:
                    ranks.kill()
                return hang
            self._note_slow()
        self._note_slow()
        return ending

    def _note_slow(self) -> None:
        """Record the nodes of slow ranks, each once in a start. Never wait: a run folder that is full is read again."""
        for node, clause in describe_slow_ranks(read_slow_ranks(self.run)).items():
            if node not in self._slow:
                with suppress(OSError, StateFileError):
                    self._append("slow", clause, node)
                    self._slow.add(node)

    def _slow_nodes(self) -> dict[str, str]:
        """Return the nodes of slow ranks that the recipe wants excluded and that are not yet, with the reasons."""
        if not self.plan.supervise.exclude_slow or not self.site.has_others:
            return {}
        clauses = {launch.faulty: launch.reason for launch in self._all_of_job() if launch.event == "slow"}
        return {node: clause for node, clause in clauses.items() if node not in self._excluded()}

    def _next_number(self) -> int:
        """Return the number of the next start; it has no heartbeats yet, even if a line of the record was lost."""
        number = sum(launch.event == "started" for launch in self._of_job())
        while heartbeats_of(self.folder, f"start-{number}").exists():
            number += 1
        return number

    @property
    def heartbeats(self) -> Path:
        """Folder of the heartbeats of the current start."""
        return heartbeats_of(self.folder, f"start-{self._number}")

    def _note(self, event: Event, reason: str = "", faulty: str = "", fault: str = "") -> Launch:
        log.info("%s%s", event, f": {reason}" if reason else "")
        return self._surely(lambda: self._append(event, reason, faulty, fault))

    def _append(self, event: Event, reason: str, faulty: str = "", fault: str = "") -> Launch:
        return self.record.append(
            event,
            self.site.job,
            restart=self._number,
            nodes=self.site.nodes,
            step=self._newest_checkpoint(),
            reason=reason,
            faulty=faulty,
            fault=fault,
        )

    def _requeue(self, reason: str) -> str:
        """Send the job back to the queue, without the nodes that it has excluded; return the event."""
        self._note("requeued", reason)
        if refusal := self.site.requeue(self._excluded()):
            return self._give_up(f"the job cannot be requeued: {refusal}")
        return "requeued"

    def _give_up(self, reason: str, ending: Ending | None = None) -> str:
        page = self.run / "gave-up.md"
        self._surely(lambda: replace_file(page, self._evidence(reason, ending)))
        return self._note("gave_up", f"{reason}; see {page}").event

    def _record_last_ending(self) -> None:
        """Record how a start ended whose supervisor could not: its node was lost, or Slurm killed all processes."""
        launches = self._of_job()
        if not launches or launches[-1].event != "started":
            return
        last = launches[-1]
        self._number = last.restart
        lost = self.site.lost(last.nodes)
        reason = f"lost {', '.join(lost)}" if lost else "Slurm ended the start and requeued the job"
        self._surely(
            lambda: self.record.append(
                "failed" if lost else "stopped",
                last.job,
                restart=last.restart,
                nodes=last.nodes,
                step=self._newest_checkpoint(),
                reason=reason,
                faulty=lost[0] if lost else "",
                fault="node" if lost else "",
            )
        )

    def _record_outside_ending(self, ending: Ending) -> str:
        """Record the ending of ranks whose job Slurm ends, or starts elsewhere; return the event."""
        if lost := self.site.lost(self.site.nodes):
            return self._note("failed", f"lost {', '.join(lost)}", lost[0], "node").event
        return self._note("stopped", f"{ending.reason}: {self.site.why_stopped()}").event

    def _of_job(self) -> list[Launch]:
        """Return the recorded events of this job that begin or end a start, or decide about one.

        Failures of earlier submissions do not count.
        """
        return [launch for launch in self._all_of_job() if launch.event != "slow"]

    def _all_of_job(self) -> list[Launch]:
        return [launch for launch in self._surely(self.record.read) if launch.job == self.site.job]

    def _failures(self) -> list[Launch]:
        return [launch for launch in self._of_job() if launch.event == "failed"]

    def _faults(self, node: str) -> int:
        return sum(launch.faulty == node for launch in self._failures())

    def _excluded(self) -> list[str]:
        return [launch.faulty for launch in self._of_job() if launch.event == "excluded"]

    def _excluded_since_a_start(self) -> list[Launch]:
        launches = self._of_job()
        started = max((number for number, launch in enumerate(launches) if launch.event == "started"), default=-1)
        return [launch for launch in launches[started + 1 :] if launch.event == "excluded"]

    def _is_newest(self) -> bool:
        """Return whether no newer start has taken over: this node may have been cut off and given up as lost."""
        starts = [launch for launch in self._surely(self.record.read) if launch.event == "started"]
        return (starts[-1].job, starts[-1].restart) == (self.site.job, self._number)

    def _newest_checkpoint(self) -> int | None:
        """Return the step of the newest checkpoint, or the last recorded one if the home does not answer."""
        if self._last_step:
            return self._last_step[0]
        try:
            steps = _committed_steps(self.plan.checkpoints)
        except Exception as error:  # backends have kinds of errors of their own
            log.warning("%s cannot be read: %s", self.plan.checkpoints, error)
            launches = self.record.read()
            return launches[-1].step if launches else None
        step = max(steps, default=None)
        if self._have_ended:
            self._last_step = [step]
        return step

    def _evidence(self, reason: str, ending: Ending | None) -> str:
        """Return the page for the person who has to repair the run."""
        lines = [f"# Given up: {reason}", "", "## What happened", ""]
        for launch in self._of_job():
            at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(launch.time))
            step = "no checkpoint" if launch.step is None else f"checkpoint at step {launch.step}"
            lines.append(f"- {at} {launch.event}, {','.join(launch.nodes) or launch.job}, {step}. {launch.reason}")
        if ending is not None:
            lines += ["", f"## Job {self.site.job}, start {self._number}", ""]
            rank = ending.rank or 0
            for path, title in (
                (output_of(self.folder, rank), f"Last lines of rank {rank}"),
                (stack_of(self.heartbeats, rank), f"Stack of rank {rank}"),
            ):
                lines += [f"{title} ({path}):", "", *(f"    {line}" for line in last_lines(path)[-40:]), ""]
        lines += ["", f"`byteloom submit {self.run}` resumes from the newest checkpoint once the cause is mended.", ""]
        return "\n".join(lines)


def _ending_of(ranks: Ranks) -> Ending | None:
    """Return how the ranks end within SUPERVISOR_POLL_SECONDS.

    Return None if they run on, or if the folder with their traces cannot be read.
    """
    deadline = time.monotonic() + SUPERVISOR_POLL_SECONDS
    while time.monotonic() < deadline:
        with suppress(OSError):
            if (ending := ranks.ending()) is not None:
                return ending
        time.sleep(ENDING_POLL_SECONDS)
    return None


def _committed_steps(home: str) -> list[int]:
    """Return the steps of the checkpoints in a home. A checkpoint at a URL has a marker."""
    files, root = file_system(home)
    marker = f"/{MARKER}" if isinstance(locate(home), Url) else ""
    paths = (Path(path.removesuffix(marker)) for path in files.glob(f"{root}/step-*{marker}"))
    return [step_of(path) for path in paths if is_step_name(path.name)]
