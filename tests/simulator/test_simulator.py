"""Three hundred seeds of faults, and planted bugs that the checkers must find."""

import dataclasses

import pytest

from eep_jax.coordination import changes, coordinator
from eep_jax.coordination.protocol import Commit
from eep_jax.coordination.state import Note, ScaleTo, Send
from tests.simulator import run
from tests.simulator.checkers import is_well
from tests.simulator.cluster import Cluster
from tests.support.factories import EXPERTS, some_cluster

SEEDS = 60


@pytest.mark.parametrize("ranks", range(2, 7))
def test_every_promise_is_kept_whatever_fails(ranks):
    clusters = [run.simulate(seed, ranks) for seed in range(SEEDS)]
    epochs = sum(len(cluster.checkers.committed) for cluster in clusters)
    assert epochs > 2 * SEEDS, "the faults hardly disturbed anyone"
    assert sum(cluster.holds for cluster in clusters) > SEEDS, "hardly a change was planned"
    assert sum(cluster.from_backup for cluster in clusters) > 0


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_without_faults_every_planned_change_is_held_for(ranks):
    """A rank is taken out and back, load shifts: no rank gives up, and no step is discarded."""
    config = some_cluster(ranks=ranks, slots_per_rank=8, redundancy=2)
    cluster = Cluster(config, EXPERTS, seed=ranks)
    for rank in range(ranks):
        cluster.spawn(rank)
    assert cluster.run_for(5_000, until=lambda: is_well(cluster))
    for out in ({ranks - 1}, set()):
        cluster.supervisor.feed(ScaleTo(frozenset(out)))
        cluster.run_for(5_000)
        assert is_well(cluster) and cluster.supervisor.state.out == out
    assert cluster.holds >= 2 and cluster.holds_given_up == 0


def test_a_seed_repeats_itself_exactly():
    assert run.simulate(7, 4).lines == run.simulate(7, 4).lines


def commit_before_all_are_ready(state, event, now_ms):
    """A coordinator that takes the readiness of one rank for that of all."""
    state, commands = coordinator.advance(state, event, now_ms)
    change = state.change
    if change is None or not change.ready:
        return state, commands
    honest = changes.is_ready
    changes.is_ready = lambda record, change: True
    try:
        state, more = changes.commit_change(state, now_ms)
    finally:
        changes.is_ready = honest
    return state, (*commands, *more)


def use_an_epoch_twice(state, event, now_ms):
    """A coordinator that gives the number of an abandoned change to the next one."""
    reused = dataclasses.replace(state, epoch_tried=state.view.epoch)
    return coordinator.advance(reused, event, now_ms)


def tell_before_it_is_written_down(state, event, now_ms):
    """A coordinator whose journal lags behind its words."""
    state, commands = coordinator.advance(state, event, now_ms)
    late = [c for c in commands if isinstance(c, Note)]
    return state, (*(c for c in commands if not isinstance(c, Note)), *late)


def never_tell_a_commit(state, event, now_ms):
    """A coordinator whose agreed epochs never reach a rank: safe, and of no use."""
    state, commands = coordinator.advance(state, event, now_ms)
    commits = [c for c in commands if isinstance(c, Send) and isinstance(c.message, Commit)]
    return state, tuple(c for c in commands if c not in commits)


@pytest.mark.parametrize(
    ("bug", "objection"),
    [
        (commit_before_all_are_ready, "was never ready for it"),
        (use_an_epoch_twice, "means two different things|is committed after|did not heal"),
        (tell_before_it_is_written_down, "means two different things|not committed"),
        (never_tell_a_commit, "did not heal"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_bug_is_found(bug, objection):
    with pytest.raises(run.Failed, match=objection) as raised:
        for seed in range(200):
            run.simulate(seed, 4, calm_ms=20_000, advance=bug)
    assert "python -m tests.simulator.run --seed=" in str(raised.value)
