"""Experts that died with their last replica come back from each source, and change no token."""

import collections
import itertools

import pytest

from eep_jax.runtime.repairs import PAUSE_PHASES
from tests.support.processes import ClusterUnderTest, is_out

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(400)]

EXPERTS, RANKS = 16, 4
# One replica of each expert, and nobody comes back: a death makes orphans.
ONE_REPLICA = "cluster.redundancy=1"
STAY_DEAD = -1
A_QUARTER_EACH = f"cluster.backup_bytes={4 * (400 << 10)}"


def cluster_with(run_dir, *overrides):
    return ClusterUnderTest(run_dir, ONE_REPLICA, *overrides, respawn_delay_ms=STAY_DEAD)


def backed_up(copies: int):
    """Whether every expert is in the memory of so many ranks."""

    def wanted(status) -> bool:
        count = collections.Counter(e for rank in status["ranks"] for e in rank["backups"])
        return [count[e] for e in range(EXPERTS)] == [copies] * EXPERTS

    return wanted


def orphans(status, *ranks) -> set[int]:
    return {e for rank in ranks for e in status["experts"]["placement"][rank] if e >= 0}


def alone(status, dead) -> set[int]:
    """Experts whose replica and whose every backup die with these ranks."""
    survivors = set(range(RANKS)) - set(dead)
    return orphans(status, *dead) - {e for r in survivors for e in status["ranks"][r]["backups"]}


def repairs(status) -> list[dict]:
    return [e for e in status["events"] if e["kind"] == "repair" and e["change"] == "repair"]


def moved(status, since) -> dict[str, int]:
    """Experts written by the ranks of both, by source."""
    total = collections.Counter()
    for rank, before in zip(status["ranks"], since["ranks"], strict=True):
        if rank["state"] == "active":
            total.update(rank["experts_moved"])
            total.subtract(before["experts_moved"])
    return {kind: count for kind, count in total.items() if count}


def all_moved(since, count: int, *dead):
    """The ranks are out, and the survivors have reported at least so many experts written.

    More where a repair was given up for a second death, and its moves made again.
    """
    return lambda s: (
        all(is_out(rank)(s) for rank in dead) and sum(moved(s, since).values()) >= count
    )


@pytest.mark.parametrize("source", ["backup", "checkpoint"])
def test_orphans_come_from_the_one_source_that_is_allowed(tmp_path, source):
    with cluster_with(tmp_path, f"cluster.sources={source}") as cluster:
        before = cluster.wait(backed_up(RANKS), "backups of all experts")
        lost = orphans(before, 1)
        with cluster.load():
            cluster.signal(1)
            status = cluster.wait(all_moved(before, len(lost), 1), "the repair")
            # Under load: every rank takes a first good step.
            status = cluster.wait(repairs, "the record of the repair")
        assert set(moved(status, before)) == {source}
        record = repairs(status)[0]
        assert record["change"] == "repair" and record["reason"].startswith("rank 1 is ending")
        assert record["moves"] == {source: len(lost)} and record["silent_ranks"] == []
        assert record["bytes"][source] > 0
        seconds = record["seconds"]
        assert all(0 <= seconds[phase] < 5 for phase in PAUSE_PHASES)
        assert sum(seconds[phase] for phase in PAUSE_PHASES) == pytest.approx(seconds["total"])
        assert status["experts"]["missing"] == []


def test_a_backup_that_dies_with_its_rank_is_replaced_by_the_next_source(tmp_path):
    with cluster_with(tmp_path, A_QUARTER_EACH, "cluster.source_order=tier") as cluster:
        before = cluster.wait(backed_up(1), "one backup of each expert")
        dead = max(itertools.combinations(range(RANKS), 2), key=lambda d: len(alone(before, d)))
        assert alone(before, dead), "every backup is on some survivor, whoever dies"
        lost = orphans(before, *dead)
        with cluster.load():
            for rank in dead:
                cluster.signal(rank)
            status = cluster.wait(all_moved(before, len(lost), *dead), "the repair")
        found = moved(status, before)
        assert set(found) == {"backup", "checkpoint"}
        assert found["checkpoint"] >= len(alone(before, dead))
        assert status["experts"]["missing"] == []
        measured = [set(r["source_bytes_per_s"]) for r in status["ranks"]]
        assert measured == [{"local", "peer", "backup", "checkpoint"}] * RANKS
