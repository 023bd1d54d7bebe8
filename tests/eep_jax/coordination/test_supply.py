"""Promises of sources in plans: live backups, what the operator allows, the fastest first."""

from eep_jax.coordination.protocol import Load, Prepare
from eep_jax.coordination.state import Ended, Ending, Send
from eep_jax.placement.sources import Backup, SourceKind
from tests.support.factories import a_serving_cluster

LOCAL, PEER, BACKUP, CHECKPOINT = SourceKind
SLOW_CHECKPOINT = {"backup": 8e9, "checkpoint": 1e8}
SLOW_BACKUP = {"backup": 1e8, "checkpoint": 8e9}


def with_backups(*ranks, rates=None, **options):
    """A serving cluster whose ranks all say that these ranks back up every expert."""
    cluster = a_serving_cluster(**options)
    for rank in range(4):
        backup = Backup(f"host{rank}:1", tuple(range(8))) if rank in ranks else Backup()
        cluster.say(rank, backup=backup, rates=rates or {})
    return cluster


def sources_after(cluster, event):
    """The sources of every move of the change that the event causes."""
    sends = [c for c in cluster.feed(event) if isinstance(c, Send)]
    prepares = [c.message for c in sends if isinstance(c.message, Prepare)]
    moves = [move for prepare in prepares for move in prepare.moves]
    assert moves, "no orphan was planned for"
    return {move: [(source.kind, source.rank) for source in move.sources] for move in moves}


def test_an_orphan_comes_from_a_live_backup_and_then_from_the_checkpoint():
    cluster = with_backups(1, 3)
    for move, sources in sources_after(cluster, Ended(3, 1)).items():
        assert sources == [(BACKUP, 1), (CHECKPOINT, -1)]
        assert move.sources[0].address == "host1:1"


def test_a_backup_of_a_rank_that_is_ending_is_no_source():
    cluster = with_backups(1, 2)
    for sources in sources_after(cluster, Ending(2, 1)).values():
        assert sources == [(BACKUP, 1), (CHECKPOINT, -1)]


def test_the_own_backup_comes_before_that_of_another_rank():
    cluster = with_backups(0, 1, 2)
    for move, sources in sources_after(cluster, Ended(3, 1)).items():
        assert sources[0] == (BACKUP, move.rank)
        assert len(sources) == 4


def test_the_fastest_as_measured_comes_first_unless_the_tier_is_chosen():
    first = lambda cluster: {s[0][0] for s in sources_after(cluster, Ended(3, 1)).values()}
    assert first(with_backups(1, rates=SLOW_CHECKPOINT)) == {BACKUP}
    assert first(with_backups(1, rates=SLOW_BACKUP)) == {CHECKPOINT}
    assert first(with_backups(1, rates=SLOW_BACKUP, source_order="tier")) == {BACKUP}


def test_only_allowed_sources_are_planned_for_a_running_cluster():
    for kind in (BACKUP, CHECKPOINT):
        cluster = with_backups(1, sources=(kind.value,))
        found = sources_after(cluster, Ended(3, 1))
        assert {k for sources in found.values() for k, _ in sources} == {kind}


def test_the_first_experts_come_from_the_checkpoint_whatever_is_allowed_later():
    cluster = a_serving_cluster(sources=("backup",))
    assert cluster.state.view.epoch == 1


def test_a_joining_rank_may_load_from_backups():
    cluster = with_backups(1)
    cluster.feed(Ended(3, 1))
    del cluster.ranks[3]
    cluster.settle()
    cluster.unsent.clear()
    cluster.say(1, backup=Backup("host1:1", tuple(range(8))))
    cluster.join(3)
    loads = [s.message for s in cluster.unsent if isinstance(s.message, Load)]
    assert loads, "it was told of no experts"
    for move in loads[-1].moves:
        assert [s.kind for s in move.sources] == [PEER, BACKUP, CHECKPOINT]
