"""One cluster of four CPU ranks for all tests of this folder; every test finds it whole."""

import pytest

from tests.support.processes import ClusterUnderTest


@pytest.fixture(scope="session")
def running(tmp_path_factory):
    with ClusterUnderTest(tmp_path_factory.mktemp("run")) as cluster:
        yield cluster


@pytest.fixture
def cluster(running):
    running.wait_whole()
    yield running
    running.wait_whole()
    running.assert_nothing_compiled()
