"""Looks after the ranks of a submitted run: starts them, notices when they hang or end, and decides what then.

    scheduler ─▶ supervise, on the job's first node ─▶ ranks        srun, or processes of this machine
                     │      ▲
                     │      └── heartbeats, the newest checkpoint, how the ranks ended
                     ▼
                 launches.jsonl; start again, back to the queue, without a node, or never more

It is a process of its own, so that it outlives every rank. A rank that dies or hangs costs the run a start in the nodes
that it has; only a request to stop and a faulty node send the job back to the queue. A node that is lost takes the job
back there by Slurm's own doing, and the supervisor of the next start finds out what happened.
"""

import json
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, Field

from byteloom.core.locations import Url, locate
from byteloom.core.state_files import StateFileError, read_json
from byteloom.core.step_folders import MARKER, is_step_name, step_of
from byteloom.core.text import count
from byteloom.core.urls import file_system
from byteloom.core.validation import Seconds
from launchers.supervision.heartbeat import Beat, Phase, beat_of, read_beat, stack_of
from launchers.supervision.record import Event, Launch, LaunchRecord

POLL_SECONDS = 0.5
ANSWER_SECONDS = 10.0
"""In which ranks are to say where they are, before they are killed."""
TIME_LIMIT = "the time limit is near"
"""Why ranks were asked to stop."""

log = logging.getLogger(__name__)


class SuperviseConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """When a run that `byteloom submit` has started counts as hung, and when as hopeless."""

    start_seconds: Seconds = 1200.0
    """From a start until the first step: meeting, loading a checkpoint, compiling."""
    step_seconds: Seconds = 300.0
    """One step, with the wait for its data."""
    evaluation_seconds: Seconds = 3600.0
    """One validation."""
    checkpoint_seconds: Seconds = 1800.0
    """The wait for a checkpoint, and what is left to do at a run's end."""
    attempts: int = Field(default=3, ge=1)
    """Starts in a row that fail, or meet the time limit, and leave no newer checkpoint; then the run is given up."""
    faults_of_node: int = Field(default=2, ge=1)
    """Failures that began on one node, after which the job is given other nodes."""

    def seconds_of(self, phase: Phase) -> float:
        """How long a rank may say nothing."""
        return {
            "start": self.start_seconds,
            "step": self.step_seconds,
            "evaluation": self.evaluation_seconds,
            "checkpoint": self.checkpoint_seconds,
            "end": self.checkpoint_seconds,
        }[phase]


@dataclass(frozen=True)
class Plan:
    """What a submission asks for; the supervisor and the ranks find it in the submission's folder."""

    entry: str
    """Of the ranks: "module:function"."""
    run: str
    """The run folder."""
    checkpoints: str
    """Where its checkpoints lie: a folder, or a URL."""
    processes_per_node: int
    cpus_per_process: int
    gpus_per_node: int
    supervise: SuperviseConfig

    def save(self, path: Path) -> None:
        tree = {**vars(self), "supervise": self.supervise.model_dump()}
        path.write_text(json.dumps(tree, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Return the plan of a submission.

        Raises:
            StateFileError: there is none, or it is damaged.
        """
        advice = "submit the run again"
        plan = read_json(path, cls, advice)
        if plan is None:
            raise StateFileError(f"{path} is missing; {advice}")
        return plan


@dataclass(frozen=True)
class Ending:
    """How the ranks of a start ended."""

    kind: str
    """finished, stopped (as they were asked to) or failed."""
    reason: str
    node: str = ""
    """Where it began to fail, if that is known."""
    rank: int | None = None


class Ranks(Protocol):
    """A start's ranks."""

    size: int

    def ending(self) -> Ending | None:
        """None while they run."""

    def ask_where(self) -> None:
        """Sends SIGQUIT to all."""

    def kill(self) -> None:
        """Ends them, wherever they are."""


class Site(Protocol):
    """Where ranks can be started: the nodes of a job, or this machine."""

    job: str
    nodes: Sequence[str]
    has_others: bool
    """Whether the job could be given other nodes."""

    def unfit(self) -> str:
        """Why no rank can run here; empty if they can."""

    def start(self, plan: Plan, folder: Path, name: str) -> Ranks:
        """Starts a rank for each processor.

        Args:
            folder: of the submission.
            name: of the start.
        """

    def owned(self) -> bool:
        """Whether the nodes are the job's still, and nobody wants it to end. Waits until that can be known."""

    def why_stopped(self) -> str:
        """Who may have asked the ranks to stop."""

    def lost(self, nodes: Sequence[str]) -> list[str]:
        """Those of an earlier start's nodes that are out of order now."""

    def requeue(self, exclude: Sequence[str]) -> str:
        """Sends the job back to the queue, not to be given some nodes again. Returns why that failed, or nothing; where
        it worked, this process is about to be ended."""


class Supervisor:
    """Of one job of a run.

    Args:
        folder: of the submission, RUN/jobs/NUMBER.
    """

    def __init__(self, folder: Path, site: Site) -> None:
        self.folder = folder
        self.site = site
        self.plan = Plan.load(folder / "plan.json")
        self.run = Path(self.plan.run)
        self.record = LaunchRecord(self.run)
        self._number = 0

    def look_after(self) -> str:
        """Until the run has finished, is sent back to the queue, or is given up; returns what became of it."""
        self._tell_of_the_last_start()
        while True:
            self._number = sum(launch.event == "started" for launch in self._of_job())
            while self.heartbeats.exists():  # a start whose line of the record was lost
                self._number += 1
            if unwanted := sorted(set(self._excluded()) & set(self.site.nodes)):
                return self._requeue(f"the job was given {', '.join(unwanted)} again", self._excluded())
            if unfit := self.site.unfit():
                return self._give_up(unfit)
            self._note("started")
            ending = self._watch(self.site.start(self.plan, self.folder, f"start-{self._number}"))
            if not self._is_newest():
                return "superseded"
            if outcome := self._after(ending):
                return outcome

    def _after(self, ending: Ending) -> str:
        """What becomes of the job; nothing, if the ranks are to be started again in its nodes."""
        if ending.kind == "finished":
            return self._note("finished").event
        if ending.kind == "stopped":
            return self._after_a_stop(ending)
        if not self.site.owned():
            return self._tell_of_the_end_from_outside(ending)
        self._note("failed", ending.reason, ending.node)
        if hopeless := self._hopeless():
            return self._give_up(hopeless, ending)
        if self.site.has_others and ending.node and self._faults(ending.node) >= self.plan.supervise.faults_of_node:
            self._note("excluded", f"{count(self._faults(ending.node), 'failure')} began on {ending.node}", ending.node)
            return self._requeue(f"without {ending.node}", self._excluded())
        return ""

    def _after_a_stop(self, ending: Ending) -> str:
        reason = f"{ending.reason}: {self.site.why_stopped()}"
        self._note("stopped", reason)
        if not self.site.owned():
            return "stopped"
        return self._give_up(hopeless, ending) if (hopeless := self._hopeless()) else self._requeue(reason)

    def _hopeless(self) -> str:
        """Why nothing is to be started any more; empty while there is hope."""
        in_vain: list[Launch] = []
        begun: int | None = None
        for launch in self._of_job():
            if launch.event == "started":
                begun = launch.step
            elif launch.event in ("failed", "stopped"):
                if launch.step != begun:
                    in_vain = []
                elif launch.event == "failed" or launch.reason.endswith(
                    TIME_LIMIT
                ):  # a preemption is not the run's fault
                    in_vain.append(launch)
        if len(in_vain) < self.plan.supervise.attempts:
            return ""
        at = f"from step {begun}" if begun else "from the beginning"
        starts = count(len(in_vain), "start")
        return f"{starts} {at} made no newer checkpoint; the last one ended with: {in_vain[-1].reason}"

    def _watch(self, ranks: Ranks) -> Ending:
        """Until the ranks have ended, by themselves or because one of them hangs."""
        vigil = Vigil(self.heartbeats, ranks.size, self.plan.supervise)
        while (ending := ranks.ending()) is None:
            if vigil.has_hung():
                ranks.ask_where()
                vigil.wait_for_answers()
                hang = vigil.describe()
                while ranks.ending() is None:
                    ranks.kill()
                    time.sleep(POLL_SECONDS)
                return hang
            time.sleep(POLL_SECONDS)
        return ending

    @property
    def heartbeats(self) -> Path:
        """Of the start under way."""
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

    def _tell_of_the_last_start(self) -> None:
        """Notes how a start ended whose supervisor could not: its node was lost, or Slurm killed all at once."""
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

    def _tell_of_the_end_from_outside(self, ending: Ending) -> str:
        """Of ranks whose job Slurm ends, or starts elsewhere."""
        if lost := self.site.lost(self.site.nodes):
            return self._note("failed", f"lost {', '.join(lost)}", lost[0]).event
        return self._note("stopped", f"{ending.reason}: {self.site.why_stopped()}").event

    def _of_job(self) -> list[Launch]:
        """What is recorded of this job: failures of those before are mended, or they would not be submitted again."""
        return [launch for launch in self.record.read() if launch.job == self.site.job]

    def _failures(self) -> list[Launch]:
        return [launch for launch in self._of_job() if launch.event == "failed"]

    def _faults(self, node: str) -> int:
        return sum(launch.faulty == node for launch in self._failures())

    def _excluded(self) -> list[str]:
        return [launch.faulty for launch in self._of_job() if launch.event == "excluded"]

    def _is_newest(self) -> bool:
        """Whether no start has taken over: this node may have been cut off and given up for lost."""
        starts = [launch for launch in self.record.read() if launch.event == "started"]
        return (starts[-1].job, starts[-1].restart) == (self.site.job, self._number)

    def _newest_checkpoint(self) -> int | None:
        """The step of it. A home that does not answer leaves it as it was recorded last."""
        try:
            committed = _committed(self.plan.checkpoints)
        except Exception as error:  # backends have kinds of errors of their own
            log.warning("%s cannot be read: %s", self.plan.checkpoints, error)
            launches = self.record.read()
            return launches[-1].step if launches else None
        return max(committed, default=None)

    def _evidence(self, reason: str, ending: Ending | None) -> str:
        """The page for a person who has to mend it."""
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


class Vigil:
    """Watches the heartbeats of a start. It looks at whether they change, so that no node's clock matters."""

    def __init__(self, folder: Path, size: int, config: SuperviseConfig) -> None:
        self._folder, self._config = folder, config
        self._seen: list[tuple[Beat | None, float]] = [(None, time.monotonic())] * size

    def has_hung(self) -> bool:
        """Whether a rank has said nothing for longer than it may."""
        return any(silence > self._config.seconds_of(phase) for _, phase, silence in self._silences())

    def _silences(self) -> list[tuple[int, Phase, float]]:
        """Of each rank, what it was at when it last beat, and how long ago."""
        now = time.monotonic()
        for rank, (earlier, _) in enumerate(self._seen):
            beat = read_beat(self._folder, rank)
            if beat != earlier:
                self._seen[rank] = (beat, now)
        return [(rank, beat.phase if beat else "start", now - since) for rank, (beat, since) in enumerate(self._seen)]

    def wait_for_answers(self) -> None:
        """Of those that can still answer."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while len(self._mute()) == len(self._seen) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1.0)

    def _mute(self) -> list[int]:
        return [rank for rank in range(len(self._seen)) if not _has_text(stack_of(self._folder, rank))]

    def describe(self) -> Ending:
        """Which rank hangs, after all were asked where they are.

        When one hangs, the others wait for it in some collective. One that was stopped or sleeps in the kernel does not
        even answer; else it is the one that has said nothing for longest.
        """
        mute = self._mute()
        silences = self._silences()
        rank, phase, silence = max((silences[rank] for rank in mute or range(len(silences))), key=lambda told: told[2])
        beat = self._seen[rank][0]
        node = beat.node if beat else ""
        at = f"in phase {phase} after step {beat.step}" if beat else "before its first heartbeat"
        answer = " and does not answer" if rank in mute else ""
        return Ending(
            "failed",
            f"rank {rank}{f' on {node}' if node else ''} hangs {at}: no heartbeat for {silence:.0f} s "
            f"(limit: supervise.{'checkpoint' if phase == 'end' else phase}_seconds){answer}",
            node,
            rank,
        )


def _committed(home: str) -> list[int]:
    """Steps of the checkpoints there. In a folder only committed ones have such names, at a URL they have a marker."""
    files, root = file_system(home)
    marker = f"/{MARKER}" if isinstance(locate(home), Url) else ""
    paths = (Path(path.removesuffix(marker)) for path in files.glob(f"{root}/step-*{marker}"))
    return [step_of(path) for path in paths if is_step_name(path.name)]


def heartbeats_of(folder: Path, name: str) -> Path:
    """Where the ranks of a start of a submission beat."""
    return folder / "heartbeats" / name


def output_of(folder: Path, rank: int) -> Path:
    """What a rank of a submission's starts wrote to standard output and error."""
    return folder / "ranks" / f"{beat_of(folder, rank).stem}.log"


def last_error(output: Path) -> str:
    """The last line in which a rank said what was wrong."""
    if not output.exists():
        return ""
    lines = output.read_text(encoding="utf-8", errors="backslashreplace").splitlines()
    wrong = re.compile(r"(rank \d+: )?(error|\w*Error|\w*Exception)\b")
    return next((line for line in reversed(lines) if wrong.match(line)), "")


def _has_text(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0
