"""A serving cluster whose ranks share a GPU: a rank dies, its experts and then itself come back.

EEP_TEST_PLATFORM=gpu python -m pytest tests/gpu/test_cluster_on_gpu.py
"""

import collections

import pytest

from tests.support.processes import ClusterUnderTest, incarnation, is_out

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

RANKS, EXPERTS, VICTIM = 2, 16, 1
START_S = 300.0  # kernels are compiled for a minute where no cache has them
# A small part of the GPU, which other tests may use at the same time.
BOTH = ("cluster.slots_per_rank=16", f"cluster.ranks={RANKS}", "device.memory_fraction=0.1")
CASES = {  # overrides, and where what a death leaves without replica comes from
    "peer": (("cluster.redundancy=2",), {}),
    "backup": (
        ("cluster.redundancy=1", "cluster.sources=backup", f"cluster.backup_bytes={64 << 20}"),
        {"backup": EXPERTS // 2},
    ),
    "checkpoint": (
        ("cluster.redundancy=1", "cluster.sources=checkpoint"),
        {"checkpoint": EXPERTS // 2},
    ),
}


def changes(kind: str):
    """The records of such changes of members, once there is one."""
    return lambda s: [e for e in s["events"] if e["kind"] == "repair" and e["change"] == kind]


def all_backed_up(status) -> bool:
    count = collections.Counter(e for rank in status["ranks"] for e in rank["backups"])
    return all(count[expert] == RANKS for expert in range(EXPERTS))


@pytest.mark.parametrize("source", CASES)
def test_a_rank_dies_and_returns_without_compiling(tmp_path, source):
    overrides, orphans = CASES[source]
    cluster = ClusterUnderTest(
        tmp_path,
        *BOTH,
        *overrides,
        arguments=["--config=tiny_gpu"],
        ranks=RANKS,
        respawn_delay_ms=3_000,
        whole_s=START_S,
    )
    with cluster:
        if source == "backup":
            cluster.wait(all_backed_up, "backups of all experts")
        before = cluster.status()
        with cluster.load():  # every completion is then compared with the unharmed ones
            cluster.signal(VICTIM)
            cluster.wait(is_out(VICTIM), "the eviction")
            repair = changes("repair")(cluster.wait(changes("repair"), "its record"))[-1]
            after = cluster.wait_whole()
        assert repair["moves"] == orphans
        assert incarnation(after, VICTIM) == incarnation(before, VICTIM) + 1
        came = lambda s: [r for r in changes("admission")(s) if str(VICTIM) in r["starts"]]
        start = came(cluster.wait(came, "the record of the return"))[-1]["starts"][str(VICTIM)]
        assert set(start["executables"].values()) == {"loaded"}
        assert start["compilations"] == 0
        cluster.assert_nothing_compiled()
