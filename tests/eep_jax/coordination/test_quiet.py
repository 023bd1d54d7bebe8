"""Promises of quiet reports: the same decisions as with a look at all ranks."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from eep_jax.coordination import coordinator
from eep_jax.coordination.quiet import is_quiet
from eep_jax.coordination.state import Disconnected, Ended, ScaleTo, Tick
from tests.support.factories import ByHand, a_serving_cluster, some_cluster

RANKS = 4
EVENTS = ["end", "lose", "join", "say", "time", "settle", "scale", "tick"]


class Twice(ByHand):
    """Feeds every event to a second coordinator, which looks at all ranks after each."""

    def __init__(self, config):
        super().__init__(config)
        self.careful = self.state

    def feed(self, event) -> tuple:
        commands = super().feed(event)
        careful = dataclasses.replace(self.careful, quiet=None)
        self.careful, wanted = coordinator.advance(careful, event, self.now_ms)
        assert commands == wanted
        same = lambda state: dataclasses.replace(state, quiet=None)
        assert same(self.state) == same(self.careful)
        return commands


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_quiet_reports_decide_what_careful_looks_decide(data):
    cluster = Twice(some_cluster(background_experts=data.draw(st.integers(0, 2))))
    for rank in range(RANKS):
        cluster.join(rank)
    cluster.settle()
    for _ in range(data.draw(st.integers(1, 14))):
        rank = data.draw(st.integers(0, RANKS - 1))
        silent = data.draw(st.sets(st.integers(0, RANKS - 1), max_size=2))
        match data.draw(st.sampled_from(EVENTS)):
            case "end":
                cluster.feed(Ended(rank, cluster.incarnations[rank]))
            case "lose":
                cluster.feed(Disconnected(rank, cluster.incarnations[rank]))
            case "join" if cluster.state.records[rank].ended and not _inside(cluster, rank):
                cluster.join(rank)
            case "say":
                cluster.say(rank, stalled_ms=data.draw(st.sampled_from([0, 9_000])))
            case "time":
                cluster.pass_time(data.draw(st.sampled_from([200, 1_400, 4_000])), silent)
            case "settle":
                cluster.settle(without=silent, rounds=2)
            case "scale":
                cluster.feed(ScaleTo(frozenset(silent)))
            case "tick":
                cluster.feed(Tick())


def test_heartbeats_of_a_calm_cluster_and_early_answers_are_quiet():
    cluster = a_serving_cluster()
    before = cluster.state
    cluster.say(1)
    assert cluster.state.quiet is before.quiet  # nobody was looked at
    assert not is_quiet(before, cluster.state, Tick(), cluster.now_ms)
    cluster.feed(Ended(3, 1))
    sends, cluster.unsent = cluster.unsent, []
    waits = cluster.state.quiet.witness
    assert waits == 2
    for send in sends:
        if send.rank in (0, 1):
            cluster.tell(send.rank, send.message)
            cluster.say(send.rank)
    assert cluster.state.quiet.witness == waits
    assert cluster.state.change.ready == {0, 1}


def _inside(cluster: ByHand, rank: int) -> bool:
    return cluster.state.view.members[rank].state.value != "absent"
