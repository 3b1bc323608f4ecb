"""A set of named runs that `sweep` and `compare` train together, on this machine or as an array on Slurm.

A second call resumes the set: runs that are finished, or that a job or a process trains, are left alone.
"""

import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from byteloom.core.provenance import save_resolved
from byteloom.core.text import count
from launchers.processes import STOPPED
from launchers.slurm.presets import ClusterConfig, load_cluster
from launchers.slurm.scheduler import JobPhase
from launchers.submission import submit_array
from pretrain.cli.arguments import BYTELOOM_COMMAND, parse_location
from pretrain.cli.runs.submit import refuse_if_trained, submission_of
from pretrain.config.errors import ConfigError
from pretrain.config.schema import Config
from pretrain.experiments.plan import FREE_SECTIONS, completed
from pretrain.experiments.results import RunResult, loss_of, read_result
from pretrain.terminal.console import say
from pretrain.terminal.losses import unit_of
from pretrain.terminal.progress import duration
from pretrain.tracking import ParentRun, fault_of
from pretrain.tracking import shown as shown_uri
from pretrain.training.run_folder import RunFolder
from pretrain.training.run_status import status_of

POLL_SECONDS = 0.2
ParallelOption = Annotated[
    int | None, typer.Option(min=1, help="Most runs at once. Default: 1 on this machine, all on a cluster.")
]
ClusterOption = Annotated[
    str | None,
    typer.Option(help="Slurm preset (gpu, cpu) or .yaml file. Default: train here.", parser=parse_location),
]


@dataclass(frozen=True)
class RunSet:
    """Named runs with their configs."""

    name: str
    """Name of the set in MLflow."""
    folder: Path
    """Folder of the set: its state, the resolved recipes, and the files of an array's submission."""
    configs: Mapping[str, Config]
    """Config of each run by the run's name, in the order of training."""
    sources: Mapping[str, Mapping[str, str]]
    """Provenance of each run's recipe, from `trace`."""
    parent: ParentRun | None = None
    """MLflow run that groups the runs; None if they are not tracked."""

    def path_of(self, name: str) -> Path:
        """Return the folder of a run."""
        return Path(self.configs[name].run.root) / name

    def results(self) -> list[RunResult]:
        """Return the state and the numbers of each run."""
        return [read_result(self.path_of(name)) for name in self.configs]

    def tracked(self, identity: str, tags: Mapping[str, str]) -> "RunSet":
        """Return the set with its own MLflow run, unless tracking is off.

        Args:
            identity: by which the MLflow run is found again.
            tags: of the MLflow run.

        Raises:
            ConfigError: MLflow refuses the run. Without it, MLflow could not group the runs.
        """
        first = next(iter(self.configs.values()))
        tracking, root = first.tracking, Path(first.run.root)
        if not tracking.enabled:
            return self
        try:
            parent = ParentRun(tracking, root, self.name, identity, len(self.configs), tags)
        except Exception as error:  # MLflow raises many kinds of errors
            raise ConfigError(
                f"MLflow at {shown_uri(tracking.store(root))}: {fault_of(error)}. MLflow groups these runs; "
                "set tracking.enabled=false to train without it"
            ) from error
        configs = {name: _child(config, parent.id) for name, config in self.configs.items()}
        return replace(self, configs=configs, parent=parent)

    def is_done(self, name: str) -> bool:
        """Return whether a run has finished with this config and has a checkpoint of its last step."""
        run, config = self.path_of(name), self.configs[name]
        if not (run / "run.json").exists():
            return False
        status = status_of(run)
        ends = (status.state, status.step, status.checkpoint_step)
        return ends == (JobPhase.FINISHED, *[config.train.steps] * 2) and _is_same(RunFolder(run), config)

    def train_here(self, parallel: int) -> int:
        """Train the unfinished runs on this machine, at most `parallel` at once; return the exit code."""
        self.folder.mkdir(parents=True, exist_ok=True)
        waiting = [name for name in self.configs if not self.is_done(name)]
        if done := len(self.configs) - len(waiting):
            say(f"{count(done, 'run')} of {len(self.configs)} finished before")
        files = {name: self.folder / f"{name}.yaml" for name in waiting}
        for name, file in files.items():
            save_resolved(file, self.configs[name].as_yaml(), self.sources[name])
        codes = train_all(files, parallel, self._report, done)
        failed = [name for name, code in codes.items() if code not in (0, *STOPPED)]
        stopped = len(codes) < len(waiting) or any(code in STOPPED for code in codes.values())
        for name in failed:
            say(f"error: {name} failed; the same command resumes it")
        if self.parent is not None:
            self.parent.set_status("FAILED" if failed else "KILLED" if stopped else "FINISHED")
        return 1 if failed else 130 if stopped else 0

    def submit(self, cluster: ClusterConfig, parallel: int | None) -> list[str]:
        """Submit the runs that are not finished and that nothing trains, as one array; return the ids of the jobs.

        Args:
            cluster: resources of each job.
            parallel: largest number of jobs at once; None for no limit.

        Raises:
            ClusterError: Slurm refuses the array.
        """
        waiting = [name for name in self.configs if not self.is_done(name) and not self._is_trained(name)]
        if not waiting:
            return []
        submissions = []
        for name in waiting:
            run = self.path_of(name).resolve()
            submissions.append(submission_of(run, self.configs[name], cluster, self.sources[name]))
            refuse_if_trained(submissions[-1])
        if self.parent is not None:
            self.parent.set_status("SCHEDULED")
        try:
            jobs = submit_array(submissions, self.folder.resolve(), parallel or len(submissions))
        except Exception:
            if self.parent is not None:
                self.parent.set_status("FAILED")
            raise
        for name, job in zip(waiting, jobs, strict=True):
            say(f"job {job} trains {self.path_of(name)}")
        return jobs

    def _is_trained(self, name: str) -> bool:
        """Return whether a job or a process trains a run, or will."""
        run = self.path_of(name)
        if not any((run / file).exists() for file in ("run.json", "launches.jsonl")):
            return False
        state = status_of(run).state
        if state not in {phase for phase in JobPhase if phase.is_alive}:
            return False
        say(f"{run} is {state} already")
        return True

    def _report(self, name: str) -> None:
        """Print the end of a run's process."""
        if (self.path_of(name) / "run.json").exists():
            result = read_result(self.path_of(name))
            loss = loss_of(result)
            shown = "" if loss is None else f", {loss:.4f} {unit_of(result.metric)}"
            say(f"{name}: {result.state} at step {result.step}{shown}, {duration(result.seconds)}")


def slurm_cluster(cluster: str | None, options: Mapping[str, Any]) -> ClusterConfig | None:
    """Return the resources that a command's options name; None to train on this machine.

    Args:
        cluster: preset or file.
        options: other options by the names of cluster fields; None where not given.

    Raises:
        ConfigError: an option needs --cluster, or the preset is one of this machine.
    """
    if cluster is None:
        if given := [name for name, value in options.items() if value is not None]:
            raise ConfigError(f"--{given[0].replace('_', '-')} needs --cluster")
        return None
    chosen = load_cluster(cluster, dict(options))
    if chosen.scheduler != "slurm":
        raise ConfigError(f"--cluster {cluster} is a preset of this machine; leave out --cluster to train here")
    return chosen


def train_all(
    recipes: Mapping[str, Path], parallel: int, report: Callable[[str], object] = lambda name: None, done: int = 0
) -> dict[str, int]:
    """Train runs; return the exit codes of those that started. No run starts after a request to stop.

    Args:
        recipes: resolved recipe of each run, by the run's name.
        parallel: largest number of runs at once.
        report: called with the name of each run that has ended.
        done: runs of the set that are not among these.
    """
    waiting, running, codes = list(recipes), dict[str, subprocess.Popen[bytes]](), dict[str, int]()
    total = done + len(recipes)
    with _noted_requests() as requests:
        while waiting or running:
            while requests:
                number, waiting = requests.pop(), []
                if number != signal.SIGINT:  # a terminal sends it to the runs too
                    for process in running.values():
                        process.send_signal(number)
            if waiting and len(running) < parallel:
                name = waiting.pop(0)
                say(f"{total - len(waiting)} of {total}: {name}")
                running[name] = subprocess.Popen([*BYTELOOM_COMMAND, "train", str(recipes[name])])
                if signal.SIGINT in requests:  # it may have come before the process
                    running[name].send_signal(signal.SIGINT)
                continue
            time.sleep(POLL_SECONDS)
            for name, process in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[name]
                    codes[name] = code
                    waiting = [] if code in STOPPED else waiting
                    report(name)
    return codes


@contextmanager
def _noted_requests() -> Iterator[list[int]]:
    """Yield a list to which each signal that asks for a stop within is added. It has no other effect."""
    found = list[int]()
    earlier = {number: signal.signal(number, lambda number, _: found.append(number)) for number in STOPPED.values()}
    try:
        yield found
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _child(config: Config, parent: str) -> Config:
    tracking = config.tracking.model_copy(update={"parent": parent})
    return config.model_copy(update={"tracking": tracking})


def _is_same(folder: RunFolder, config: Config) -> bool:
    """Return whether a run was trained with a config, apart from sections that do not change its numbers."""
    try:
        stored = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return False  # `train` decides
    trained = completed(stored) if isinstance(stored, dict) else None
    if trained is None:
        return False
    then, now = trained.as_tree(), config.as_tree()
    return all(then[name] == section for name, section in now.items() if name not in FREE_SECTIONS)
