"""Processes that may come in, ask again, or are turned away for good."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eep_jax.coordination.protocol import Fenced, Refused, Welcome
from eep_jax.coordination.state import Arrived, Unrecorded
from eep_jax.runtime.control.messages import Hello
from eep_jax.runtime.supervisor.admission import Returns, Seen, admit, out_of_reach

NEW = Hello(rank=1, incarnation=0, pid=7, ticks=9, host="a", run="tiny")
NOBODY = Seen(newest=0, is_newest=False, peers=(), watchable=True)


def a_hello(rank: int = 1, **changes) -> Hello:
    return dataclasses.replace(NEW, rank=rank, **changes)


def seen(**changes) -> Seen:
    return dataclasses.replace(NOBODY, **changes)


def test_a_new_process_asks_for_a_place():
    assert admit(NEW, NOBODY) == Arrived(1)
    assert admit(NEW, seen(newest=4)) == Arrived(1), "whether the old one has ended is not asked"


def test_a_process_that_lost_its_welcome_is_told_again_which_it_is():
    assert admit(NEW, seen(newest=4, is_newest=True)) == Welcome(incarnation=4)


def test_a_process_that_calls_again_goes_on_and_an_older_one_is_fenced():
    assert admit(a_hello(incarnation=4), seen(newest=4)) == Returns()
    answer = admit(a_hello(incarnation=3), seen(newest=4))
    assert isinstance(answer, Fenced) and "incarnation 3 of rank 1" in answer.reason


def test_a_process_that_a_later_supervisor_let_in_is_for_the_coordinator_to_settle():
    assert admit(a_hello(incarnation=5), seen(newest=4)) == Unrecorded(1, 5)


def test_where_nobody_would_see_it_die_it_asks_again():
    answer = admit(a_hello(host="b"), seen(watchable=False))
    assert isinstance(answer, Refused) and "no launcher of host b" in answer.reason


def test_out_of_reach_is_said_before_all_that_could_change():
    peers = (a_hello(0, host="b", mirrored=True),)
    answer = admit(NEW, seen(peers=peers, watchable=False))
    assert isinstance(answer, Fenced) and "ranks [1] serve no mirror" in answer.reason


@pytest.mark.parametrize("newest", [0, 4])
def test_a_process_that_was_let_in_is_not_asked_how_it_is_reached(newest):
    peers = (a_hello(0, host="b"),)
    hello = a_hello(incarnation=newest)
    known = seen(newest=newest or 2, is_newest=True, peers=peers, watchable=False)
    assert isinstance(admit(hello, known), Returns | Welcome)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.booleans()), min_size=1, max_size=5))
def test_ranks_reach_each_other_on_one_host_or_if_all_serve_mirrors(ranks):
    hellos = [a_hello(r, host=host, mirrored=m) for r, (host, m) in enumerate(ranks)]
    reason = out_of_reach(hellos[-1], tuple(hellos[:-1]))
    one_host = len({host for host, _ in ranks}) == 1
    assert (reason == "") == (one_host or all(mirrored for _, mirrored in ranks))
    if reason:
        apart = [rank for rank, (_, mirrored) in enumerate(ranks) if not mirrored]
        assert f"ranks {apart} serve no mirror" in reason
