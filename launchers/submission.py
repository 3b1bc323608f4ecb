"""Submission of a run: write everything that the job needs to the run folder, then submit it through submitit.

    RUN/launches.jsonl       events of the run's jobs; see record.py
    RUN/gave-up.md           why the run was given up, if it was
    RUN/jobs/001/            the first submission; another one of the same run is 002
        config.yaml          the resolved recipe, which every start of this job trains
        config.source.json   the original recipe, and the commits of its repository and of Byteloom
        code/                a copy of the packages, which every start of this job runs
        cluster.yaml         resources of the job
        plan.json            plan of the supervisor
        batch.log            log of the supervisor
        ranks/               rank-00000.log, …: standard output and error of each rank
        heartbeats/          start-0/, …: last heartbeat of each rank of a start; srun.log
        submitit/            the batch script, and submitit's own files

The job runs the supervisor on its first node. The supervisor starts the ranks with `srun`.
"""

import compileall
import logging
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from byteloom.core.storage.locks import lock_file
from launchers.environment import replaced_environment, silenced_streams
from launchers.slurm import calls, scheduler
from launchers.slurm.allocation import Allocation, srun_command
from launchers.slurm.calls import SchedulerError
from launchers.slurm.executors import accepted, import_submitit
from launchers.slurm.limits import why_it_would_wait
from launchers.slurm.presets import ClusterConfig, ClusterError, load_cluster, refusal
from launchers.supervision.machine import Machine, is_running
from launchers.supervision.plan import LaunchPlan
from launchers.supervision.record import LaunchRecord, last_submission, submissions_of
from launchers.supervision.supervisor import Supervisor

JOB_PACKAGES = ("byteloom", "data_pipeline", "launchers", "pretrain")
LONGEST_LOCAL_MINUTES = 60 * 24 * 365


class Submission:
    """One job of a run.

    Args:
        run: the run folder.
        recipe: the resolved recipe, as YAML.
        plan: of the supervisor.
        cluster: resources of the job.
        source: JSON text that records the origin of the recipe.
    """

    def __init__(self, run: Path, recipe: str, plan: LaunchPlan, cluster: ClusterConfig, source: str = "") -> None:
        self.run, self.recipe, self.plan, self.cluster, self.source = run, recipe, plan, cluster, source
        self.folder = self._next_folder()
        """Folder of the submission. Until it is written, another submission of the run may take it."""
        self.doubts: Sequence[str] = ()
        """Reasons why the job would wait without an end, which `refuse` finds."""

    def _next_folder(self) -> Path:
        return self.run / "jobs" / f"{max(submissions_of(self.run), default=0) + 1:03d}"

    def script(self) -> str:
        """Return the batch script."""
        command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(self._submitit))}"
        script: str = import_submitit().slurm.slurm._make_sbatch_string(
            command=command, folder=self._submitit, **self.parameters(shlex.quote(str(self.folder)))
        )
        return script

    def srun(self) -> str:
        """Return the command that starts the ranks on the smallest number of nodes."""
        return shlex.join(srun_command(self.plan, self.folder, self.cluster.least_nodes, "start-0"))

    def submit(self) -> str:
        """Submit the job; return its id.

        Raises:
            ClusterError: an earlier job of the run has not ended, the run folder cannot be written, or the scheduler
                refuses the job.
        """
        self.refuse()
        with self.written():
            job = self._submit()
            with self._writing():
                self.note(job)
        return job

    @contextmanager
    def written(self) -> Iterator[None]:
        """Write what the job needs, for a block that submits it. No other submission of the run happens meanwhile.

        If the block fails, what was written is removed.

        Raises:
            ClusterError: an earlier job of the run has not ended, or the run folder cannot be written.
        """
        lock = self.run / "jobs" / "lock"
        with self._writing():
            lock.parent.mkdir(parents=True, exist_ok=True)
        with lock_file(lock):
            self.refuse_second()
            self.folder = self._next_folder()
            try:
                with self._writing():
                    self.write()
                yield
            except BaseException:
                shutil.rmtree(self.folder, ignore_errors=True)
                raise

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            why = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror  # of the first of many
            raise ClusterError(f"cannot write to the run folder {self.run}: {why}") from error

    def note(self, job: str) -> None:
        """Record that the scheduler has accepted the job."""
        (self.run / "gave-up.md").unlink(missing_ok=True)
        LaunchRecord(self.run).append("submitted", job, reason=str(self.folder))

    @property
    def _submitit(self) -> Path:
        return self.folder / "submitit"

    def refuse(self) -> None:
        """Check that the job can be submitted.

        Raises:
            ClusterError: an earlier job has not ended, or Slurm could never run this job.
            MissingPackageError: submitit is not installed.
        """
        import_submitit()
        self.refuse_second()
        if self.cluster.scheduler == "slurm":
            self._refuse_the_impossible()

    def refuse_second(self) -> None:
        """Raise ClusterError if an earlier job of the run has not ended."""
        launches = LaunchRecord(self.run).read()
        if not launches:
            return
        job = launches[-1].job
        earlier = last_submission(self.run)
        if earlier and load_cluster(str(earlier / "cluster.yaml"), {}).scheduler == "local":
            lives, state = is_running(launches[-1]), "running"
        else:
            try:
                phase = scheduler.job(job).phase
            except SchedulerError:
                return  # the submission of this job reports it
            lives, state = phase.is_alive, phase.value
        if lives:
            raise ClusterError(
                f"{self.run} has the job {job}, which is {state}; `byteloom cancel {self.run}` cancels it"
            )

    def _refuse_the_impossible(self) -> None:
        """Raise ClusterError if no node can run the job. Many clusters accept such a job, and never start it.

        sbatch also calls a job impossible that only waits: for a node that is drained, or for a longer time limit.
        """
        if shutil.which("sbatch") is None:
            raise ClusterError(
                "this machine has no sbatch: Slurm is not installed, or its environment module is not loaded; submit "
                "from a machine that has it, or use --cluster local"
            )
        self.doubts = why_it_would_wait(self.cluster)
        rehearsal = calls.ask("sbatch", "--test-only", text=self.script())
        if rehearsal.returncode and not self.doubts:
            raise refusal(rehearsal.stderr)

    def write(self) -> None:
        """Write what the job needs to its folder."""
        for folder in (self.folder, self.folder / "ranks", self._submitit):
            folder.mkdir(parents=True)
        (self.folder / "config.yaml").write_text(self.recipe, encoding="utf-8")
        (self.folder / "config.source.json").write_text(self.source, encoding="utf-8")
        (self.folder / "cluster.yaml").write_text(yaml.safe_dump(self.cluster.model_dump()), encoding="utf-8")
        self.plan.save(self.folder / "plan.json")
        source = Path(__file__).parents[1]
        for package in JOB_PACKAGES:
            shutil.copytree(
                source / package, self.folder / "code" / package, ignore=shutil.ignore_patterns("__pycache__")
            )
        compileall.compile_dir(self.folder / "code", quiet=2)  # once, and not by each rank at each start

    def _submit(self) -> str:
        arguments = (supervise, str(self.folder), self.cluster.scheduler)
        if self.cluster.scheduler == "local":
            local = import_submitit().LocalExecutor(self._submitit)
            local.update_parameters(timeout_min=LONGEST_LOCAL_MINUTES, gpus_per_node=self.cluster.gpus)
            path = os.pathsep.join(filter(None, (f"{self.folder}/code", os.environ.get("PYTHONPATH"))))
            with replaced_environment(os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}), silenced_streams():
                return str(local.submit(*arguments).job_id)
        return _submit_to_slurm(self._submitit, self.parameters(shlex.quote(str(self.folder))), [arguments])[0]

    def parameters(self, folder: str) -> dict[str, Any]:
        """Return submitit's parameters.

        Args:
            folder: of the submission, quoted for the shell.
        """
        cluster = self.cluster
        return {
            **cluster.as_submitit(),
            "job_name": self.run.name,
            "nodes": cluster.least_nodes + cluster.spares,
            # For one task on each node. With a number of tasks, Slurm would give 2-4 nodes only as many as hold them.
            "cpus_per_task": cluster.ranks_per_node * cluster.cpus_per_process,
            "gpus_per_node": cluster.gpus_per_node if cluster.gpus else None,
            "use_srun": False,  # submitit starts the supervisor, which starts srun
            "setup": [
                f"folder={folder}",
                # If the output cannot be opened, Slurm fails the job without a message; so the job checks first.
                '[ -e "$folder/plan.json" ] || '
                '{ scontrol update JobId="$SLURM_JOB_ID" Comment="$SLURMD_NODENAME cannot see $folder: '
                'put run.root on a file system that all nodes share"; exit 1; }',
                'exec >> "$folder/batch.log" 2>&1',
                *cluster.setup,
                'export PYTHONPATH="$folder/code${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1',
            ],
            "additional_parameters": {
                "nodes": cluster.allocated_nodes,
                "requeue": True,
                "output": "/dev/null",
                **({"no-kill": True} if cluster.spares else {}),  # the job lives on when it loses a node
                **cluster.sbatch,
            },
        }


def submit_array(submissions: Sequence[Submission], folder: Path, parallel: int) -> list[str]:
    """Submit jobs of several runs as the tasks of one array; return their ids.

    Args:
        submissions: all with the same resources.
        folder: of submitit's files; its name is the array's name in the queue.
        parallel: largest number of tasks at once.

    Raises:
        ClusterError: an earlier job of a run has not ended, or Slurm refuses the array.
        OSError: a folder cannot be written.
    """
    for each in submissions:
        each.refuse()
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for each in sorted(submissions, key=lambda each: each.run):  # in the order of any other submission
            stack.enter_context(each.written())
        names = folder / "submissions"
        names.write_text("".join(f"{each.folder}\n" for each in submissions), encoding="utf-8")
        its_line = f'$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {shlex.quote(str(names))})'
        parameters = submissions[0].parameters(its_line) | {"job_name": folder.name}
        tasks = [(supervise, str(each.folder), "slurm") for each in submissions]
        jobs = _submit_to_slurm(folder, {**parameters, "array_parallelism": parallel}, tasks)
        for each, job in zip(submissions, jobs, strict=True):
            each.note(job)
    return jobs


def _submit_to_slurm(folder: Path, parameters: Mapping[str, Any], tasks: Sequence[tuple[Any, ...]]) -> list[str]:
    """Submit one call, or several as an array; return the ids of the jobs."""
    submitit = import_submitit()

    def submit() -> list[str]:
        slurm = submitit.SlurmExecutor(folder)
        slurm.update_parameters(**parameters)
        with slurm.batch():
            jobs = [slurm.submit(*task) for task in tasks]
        return [job.job_id for job in jobs]

    return accepted(submit, folder)


def supervise(folder: str, scheduler: str) -> str:
    """Supervise the ranks of a job; return the last event. The job runs this function.

    Args:
        folder: of the submission.
        scheduler: "slurm" or "local".

    Raises:
        SystemExit: the run was given up; the exit code makes the scheduler call the job failed.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, stream=sys.stderr)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT):
        signal.signal(
            number, lambda *_: None
        )  # submitit's handler would requeue; Slurm signals the ranks, and this process waits for them
    path = Path(folder)
    event = Supervisor(path, Machine() if scheduler == "local" else Allocation(path)).supervise()
    if event == "gave_up":
        sys.exit(1)
    return event
