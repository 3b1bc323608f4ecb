"""Shared by the tests that need a cluster."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, running_cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four nodes of four processors, for the tests of a file."""
    with running_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster
