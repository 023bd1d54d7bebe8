"""One cluster of four CPU ranks for all tests of this folder; every test finds it whole."""

import pytest

from eep_jax.config import ClusterConfig
from tests.support.processes import ClusterUnderTest


@pytest.fixture(scope="session")
def running(tmp_path_factory):
    nice = ClusterConfig.joiner_nice
    with ClusterUnderTest(tmp_path_factory.mktemp("run"), joiner_nice=nice) as cluster:
        yield cluster


@pytest.fixture
def cluster(running):
    running.wait_whole()
    yield running
    running.wait_whole()
    running.assert_nothing_compiled()
