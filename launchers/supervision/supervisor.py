"""Supervisor of a submitted run: it starts the ranks, notices when they hang or end, and decides what follows.

    scheduler ─▶ supervise, on the job's first node ─▶ ranks        srun, or processes of this machine
                     │      ▲
                     │      └── heartbeats, the newest checkpoint, how the ranks ended
                     ▼
                 launches.jsonl; then start again, requeue, requeue without a node, or give up

It is a process of its own, so it outlives every rank. After a rank dies or hangs, the ranks are started again on the
same nodes. Only a request to stop and a faulty node send the job back to the queue. Slurm itself requeues a job that
has lost a node; the supervisor of the next start finds out what happened.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from byteloom.core.locations import Url, locate
from byteloom.core.step_folders import MARKER, is_step_name, step_of
from byteloom.core.text import count
from byteloom.core.urls import file_system
from launchers.supervision.hangs import HangDetector
from launchers.supervision.heartbeat import stack_of
from launchers.supervision.plan import LaunchPlan, heartbeats_of, output_of
from launchers.supervision.record import Event, Launch, LaunchRecord
from launchers.supervision.site import Ending, Ranks, Site

SUPERVISOR_POLL_SECONDS = 0.5
"""Time between two looks at the ranks."""
TIME_LIMIT = "the time limit is near"
"""Reason for a request to stop that counts as an attempt."""

log = logging.getLogger(__name__)


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
        self.record = LaunchRecord(self.run)
        self._number = 0
        """Number of the current start."""

    def supervise(self) -> str:
        """Start the ranks until the run has finished, is requeued, or is given up; return the event that ended it."""
        self._record_last_ending()
        while True:
            self._number = sum(launch.event == "started" for launch in self._of_job())
            while self.heartbeats.exists():  # a start whose line of the record was lost
                self._number += 1
            if unwanted := sorted(set(self._excluded()) & set(self.site.nodes)):
                return self._requeue(f"the job was given {', '.join(unwanted)} again", self._excluded())
            if problem := self.site.why_unusable():
                return self._give_up(problem)
            self._note("started")
            ending = self._watch(self.site.start(self.plan, self.folder, f"start-{self._number}"))
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
        self._note("failed", ending.reason, ending.node)
        if hopeless := self._hopeless():
            return self._give_up(hopeless, ending)
        if self.site.has_others and ending.node and self._faults(ending.node) >= self.plan.supervise.faults_of_node:
            self._note("excluded", f"{count(self._faults(ending.node), 'failure')} began on {ending.node}", ending.node)
            return self._requeue(f"without {ending.node}", self._excluded())
        return ""

    def _after_stop(self, ending: Ending) -> str:
        reason = f"{ending.reason}: {self.site.why_stopped()}"
        self._note("stopped", reason)
        if not self.site.is_owned():
            return "stopped"
        return self._give_up(hopeless, ending) if (hopeless := self._hopeless()) else self._requeue(reason)

    def _hopeless(self) -> str:
        """Return why the run is not to be started again; empty if it is."""
        in_vain: list[Launch] = []
        begun: int | None = None
        for launch in self._of_job():
            if launch.event == "started":
                begun = launch.step
            elif launch.event in ("failed", "stopped"):
                if launch.step != begun:
                    in_vain = []
                # A preemption is not the run's fault.
                elif launch.event == "failed" or launch.reason.endswith(TIME_LIMIT):
                    in_vain.append(launch)
        if len(in_vain) < self.plan.supervise.attempts:
            return ""
        at = f"from step {begun}" if begun else "from the beginning"
        starts = count(len(in_vain), "start")
        return f"{starts} {at} made no newer checkpoint; the last one ended with: {in_vain[-1].reason}"

    def _watch(self, ranks: Ranks) -> Ending:
        """Wait until the ranks have ended; kill them if one hangs."""
        detector = HangDetector(self.heartbeats, ranks.size, self.plan.supervise)
        while (ending := ranks.ending()) is None:
            if detector.has_hung():
                ranks.ask_where()
                detector.wait_for_stacks()
                hang = detector.describe()
                while ranks.ending() is None:
                    ranks.kill()
                    time.sleep(SUPERVISOR_POLL_SECONDS)
                return hang
            time.sleep(SUPERVISOR_POLL_SECONDS)
        return ending

    @property
    def heartbeats(self) -> Path:
        """Folder of the heartbeats of the current start."""
        return heartbeats_of(self.folder, f"start-{self._number}")

    def _note(self, event: Event, reason: str = "", faulty: str = "") -> Launch:
        log.info("%s%s", event, f": {reason}" if reason else "")
        return self.record.append(
            event,
            self.site.job,
            restart=self._number,
            nodes=self.site.nodes,
            step=self._newest_checkpoint(),
            reason=reason,
            faulty=faulty,
        )

    def _requeue(self, reason: str, exclude: Sequence[str] = ()) -> str:
        self._note("requeued", reason)
        if refusal := self.site.requeue(exclude):
            return self._give_up(f"the job cannot be requeued: {refusal}")
        return "requeued"

    def _give_up(self, reason: str, ending: Ending | None = None) -> str:
        page = self.run / "gave-up.md"
        page.write_text(self._evidence(reason, ending), encoding="utf-8")
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
        self.record.append(
            "failed" if lost else "stopped",
            last.job,
            restart=last.restart,
            nodes=last.nodes,
            step=self._newest_checkpoint(),
            reason=reason,
            faulty=lost[0] if lost else "",
        )

    def _record_outside_ending(self, ending: Ending) -> str:
        """Record the ending of ranks whose job Slurm ends, or starts elsewhere; return the event."""
        if lost := self.site.lost(self.site.nodes):
            return self._note("failed", f"lost {', '.join(lost)}", lost[0]).event
        return self._note("stopped", f"{ending.reason}: {self.site.why_stopped()}").event

    def _of_job(self) -> list[Launch]:
        """Return the recorded events of this job; failures of earlier submissions do not count."""
        return [launch for launch in self.record.read() if launch.job == self.site.job]

    def _failures(self) -> list[Launch]:
        return [launch for launch in self._of_job() if launch.event == "failed"]

    def _faults(self, node: str) -> int:
        return sum(launch.faulty == node for launch in self._failures())

    def _excluded(self) -> list[str]:
        return [launch.faulty for launch in self._of_job() if launch.event == "excluded"]

    def _is_newest(self) -> bool:
        """Return whether no newer start has taken over: this node may have been cut off and given up as lost."""
        starts = [launch for launch in self.record.read() if launch.event == "started"]
        return (starts[-1].job, starts[-1].restart) == (self.site.job, self._number)

    def _newest_checkpoint(self) -> int | None:
        """Return the step of the newest checkpoint, or the last recorded one if the home does not answer."""
        try:
            steps = _committed_steps(self.plan.checkpoints)
        except Exception as error:  # backends have kinds of errors of their own
            log.warning("%s cannot be read: %s", self.plan.checkpoints, error)
            launches = self.record.read()
            return launches[-1].step if launches else None
        return max(steps, default=None)

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
                text = path.read_text(encoding="utf-8", errors="backslashreplace") if path.exists() else ""
                lines += [f"{title} ({path}):", "", *(f"    {line}" for line in text.splitlines()[-40:]), ""]
        lines += ["", f"`byteloom submit {self.run}` resumes from the newest checkpoint once the cause is mended.", ""]
        return "\n".join(lines)


def _committed_steps(home: str) -> list[int]:
    """Return the steps of the checkpoints in a home. A checkpoint at a URL has a marker."""
    files, root = file_system(home)
    marker = f"/{MARKER}" if isinstance(locate(home), Url) else ""
    paths = (Path(path.removesuffix(marker)) for path in files.glob(f"{root}/step-*{marker}"))
    return [step_of(path) for path in paths if is_step_name(path.name)]
