"""Eight ranks lose one, one more, and two at once, or four at once, and get all of them back.

No token changes. A small model of its own, since eight ranks compile for it.
"""

import itertools
import time

import pytest

from tests.support.processes import ClusterUnderTest, events_after, is_out
from tests.support.small_checkpoint import MODEL, save_small

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(900)]

RANKS, EXPERTS, SLOTS = 8, MODEL.experts, 4
FEWEST = EXPERTS // SLOTS  # ranks that have a slot for every expert
WHOLE_S = 400.0  # eight ranks compile at once, perhaps on two cores that others use too
SETTINGS = (
    f"cluster.ranks={RANKS}",
    f"cluster.slots_per_rank={SLOTS}",
    # Nothing moves but for a death, so that what a repair moved can be compared with its orphans.
    "cluster.background_experts=0",
    # A death is seen by the exit. Eight ranks of two cores may be silent for long without one.
    "cluster.lease_ms=30000",
    "cluster.accused_lease_ms=30000",
    "cluster.channel_grace_ms=15000",
    "engine.step_deadline_ms=30000",
)


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    directory = tmp_path_factory.mktemp("eight")
    with ClusterUnderTest(
        directory / "run",
        *SETTINGS,
        arguments=(save_small(directory / "checkpoint"),),
        ranks=RANKS,
        respawn_delay_ms=-1,
        whole_s=WHOLE_S,
    ) as cluster:
        yield cluster


def kill(eight, ranks, gone) -> None:
    """Kills ranks under load, all at once; `gone` are out already."""
    with eight.load():
        for rank in ranks:
            eight.signal(rank)
        out = {*gone, *ranks}
        status = eight.wait(lambda s: all(is_out(r)(s) for r in out), f"service without {out}")
        assert status["experts"]["missing"] == []
        members = {r["rank"] for r in status["ranks"] if r["state"] == "active"}
        assert members == set(range(RANKS)) - out


def bring_back(eight, ranks) -> None:
    """Starts new processes of dead ranks under load: they load what their last ones compiled."""
    started = time.time()
    with eight.load():
        for rank in ranks:
            eight.cluster.start_rank(rank)
        status = eight.wait_whole()
        assert status["experts"]["replicas_min"] == 2
        told = lambda s: all(str(rank) in starts(s, started) for rank in ranks)
        found = starts(eight.wait(told, "the records of the returns"), started)
    for rank in ranks:
        assert set(found[str(rank)]["executables"].values()) == {"loaded"}
        assert found[str(rank)]["compilations"] == 0


def starts(status: dict, since: float) -> dict:
    """Of the processes that came in, by rank."""
    return {
        r: start for e in events_after(status, since, "repair") for r, start in e["starts"].items()
    }


def assert_only_orphans_moved(before: dict, status: dict, since: float) -> None:
    """What had a live replica was not moved, and what had none was, once."""
    commits = events_after(status, since, "commit")
    slots, epoch, repairs = before["experts"]["placement"], before["epoch"], 0
    for commit in commits:
        if commit["change"] == "repair":
            held = {e for rank in commit["members"] for e in slots[int(rank)]}
            orphans = sorted(set(range(EXPERTS)) - held)
            moved = sorted(move["expert"] for move in commit["moves"])
            # Where a change was given up for a further death, its moves were made again.
            given_up = commit["epoch"] > epoch + 1
            assert moved == orphans or (given_up and set(moved) >= set(orphans)), commit
            repairs += 1
        slots, epoch = commit["slots"], commit["epoch"]
    assert repairs


def test_eight_seven_six_four_and_eight_again(eight):
    before, started, gone = eight.status(), time.time(), []
    for dying in ((7,), (2,), (4, 5)):
        kill(eight, dying, gone)
        gone += dying
    assert RANKS - len(gone) == FEWEST
    assert_only_orphans_moved(before, eight.status(), started)
    bring_back(eight, gone)
    eight.assert_nothing_compiled()


def test_four_of_eight_at_once_and_eight_again(eight):
    eight.wait_whole()
    before, started = eight.status(), time.time()
    placement = before["experts"]["placement"]
    orphans = lambda dead: (
        EXPERTS
        - len({e for rank, row in enumerate(placement) if rank not in dead for e in row if e >= 0})
    )
    dying = max(itertools.combinations(range(RANKS), RANKS - FEWEST), key=orphans)
    assert orphans(dying) > 0
    kill(eight, dying, ())
    assert_only_orphans_moved(before, eight.status(), started)
    bring_back(eight, dying)
    eight.assert_nothing_compiled()
