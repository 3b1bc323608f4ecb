"""Arrays on a real cluster: corpora prepared by tasks that are killed, and grids of runs."""

import os
import signal
from pathlib import Path

import pytest

from data_pipeline.prepare import prepare
from data_pipeline.shards import Corpus
from launchers import scheduler
from launchers.scheduler import Phase
from tests.conftest import BYTELOOM, STDLIB, prepare_options
from tests.slurm.cluster import Cluster

SOURCES = [STDLIB / name for name in ("asyncio", "email", "unittest", "idlelib", "distutils", "lib2to3")]


@pytest.fixture(autouse=True)
def the_cluster(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])


def test_a_preparation_array_with_killed_tasks_ends_in_the_manifest_of_one_process(cluster: Cluster, tmp_path: Path):
    options = {"include": ["*.py"], "holdout": 0.1, "shard_bytes": 100_000, "block_bytes": 20_000, "level": 19}
    prepare(SOURCES, tmp_path / "alone", prepare_options(**options), lambda done, total: None)
    out = tmp_path / "out"
    words = ["--include=*.py", "--holdout=0.1", "--shard-bytes=100000", "--block-bytes=20000", "--level=19"]
    said = cluster.run(BYTELOOM, "prepare", *SOURCES, f"--out={out}", *words, "--slurm", "--tasks=6", "--parallel=2")
    array, merge = said.split()
    killed, most = set[str](), 0
    while scheduler.job(merge).phase.is_alive:
        time.sleep(0.1)
        running = [job.id for job in scheduler.jobs(array) if job.phase is Phase.RUNNING]
        most = max(most, len(running))
        if len(killed) < 2 and list(tmp_path.glob("out.partial/shards/*.json")):
            for task in [task for task in running if task not in killed][: 2 - len(killed)]:
                for process in cluster.processes(task)[:1]:
                    os.kill(process, signal.SIGKILL)
                    killed.add(task)
    assert scheduler.job(merge).phase is Phase.FINISHED
    assert len(killed) == most == 2
    assert {job.id for job in scheduler.jobs(array) if job.restarts} == killed
    assert {job.phase for job in scheduler.jobs(array)} == {Phase.FINISHED}
    for part in ("train", "validation"):
        with Corpus(out / part) as corpus, Corpus(tmp_path / "alone" / part) as expected:
            assert corpus.manifest == expected.manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "out", "out.jobs"]
