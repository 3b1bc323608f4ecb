"""Fixtures of the tests that need a Slurm cluster."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, running_cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Run a cluster of four nodes with four processors each, shared by the tests of a file."""
    with running_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster
