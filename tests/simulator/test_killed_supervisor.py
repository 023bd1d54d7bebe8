"""The supervisor is killed at every step of every kind of change, over real files.

Each time the next one has only the journal, and the cluster must come to rest with no promise
broken (the checkers look at every event) and no process lost that the story did not kill.
"""

import collections
import random

import pytest

from eep_jax.coordination import coordinator
from eep_jax.coordination.state import ScaleTo
from eep_jax.runtime.control.endpoint import JOURNAL
from eep_jax.runtime.history.journal import replay
from tests.simulator.checkers import SafetyViolated, is_well
from tests.simulator.filed_supervisor import FiledCluster
from tests.simulator.test_simulator import tell_before_it_is_written_down
from tests.support.control_world import a_config

RANKS, HEALS_MS = 4, 120_000
CONFIG = a_config(RANKS, slots_per_rank=3, redundancy=2)
STEPS_MAX = 400


def formation(cluster: FiledCluster) -> set[int]:
    return set()


def repair(cluster: FiledCluster) -> set[int]:
    victim = cluster.newest(1)
    cluster.kill(victim)
    return {victim.pid}


def admission(cluster: FiledCluster) -> set[int]:
    victims = repair(cluster)
    cluster.armed = False
    cluster.run_for(5_000)
    cluster.armed = True
    cluster.spawn(1)
    return victims


def drain(cluster: FiledCluster) -> set[int]:
    cluster.supervisor.feed(ScaleTo(frozenset({2})))
    return set()


def death_in_a_change(cluster: FiledCluster) -> set[int]:
    victims = repair(cluster)
    cluster.run_for(1_000, until=lambda: cluster.supervisor and cluster.supervisor.state.change)
    second = cluster.newest(3)
    cluster.kill(second)
    return victims | {second.pid}


STORIES = (formation, repair, admission, drain, death_in_a_change)


def play(run_dir, story, kills: list[int], advance=coordinator.advance) -> FiledCluster:
    """The story, with kills; everything must be well at its end."""
    run_dir.mkdir()
    cluster = FiledCluster(run_dir, kills, CONFIG, advance)
    try:
        for rank in range(RANKS):
            cluster.spawn(rank)
        cluster.armed = story is formation
        assert story is formation or cluster.run_for(HEALS_MS, until=lambda: is_well(cluster))
        cluster.armed = True
        before = {process.pid for process in cluster.living()}
        victims = story(cluster)
        cluster.run_for(3_000)
        for rank in range(RANKS):
            cluster.respawn(rank)
        assert cluster.run_for(HEALS_MS, until=lambda: is_well(cluster)), cluster.lines[-30:]
        lost = before - victims - {process.pid for process in cluster.living()}
        assert not lost, f"processes {lost} ended with the supervisor: {cluster.died_at}"
        epochs = [r["epoch"] for r in replay(run_dir / JOURNAL) if r["kind"] == "commit"]
        assert epochs == sorted(set(epochs)) and epochs[-1] == cluster.supervisor.state.view.epoch
        return cluster
    finally:
        cluster.close()


def at_every_step(directory, story, later: list[int]) -> collections.Counter:
    """Where supervisors died: the first at every step of the change, the next ones at `later`."""
    died_at = collections.Counter()
    for step in range(STEPS_MAX):
        cluster = play(directory / str(step), story, [step, *later])
        if not cluster.died_at:
            return died_at  # the change has fewer steps
        died_at.update(cluster.died_at)
    pytest.fail(f"more than {STEPS_MAX} steps")


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_at_every_step_of_a_change(tmp_path, story):
    died_at = at_every_step(tmp_path, story, [])
    for point in (
        "before Note prepare",
        "half of prepare",
        "before Send Prepare",
        "Status",
        "before Note commit",
        "half of commit",
        "before Send Commit",
    ):
        assert died_at[point], f"never at {point}: {died_at}"


def test_and_the_next_ones_too_each_in_the_prepare_of_its_own(tmp_path):
    """Up to three in a row; most of them while a Prepare is open that ranks already carry out."""
    dice, died_at = random.Random(5), collections.Counter()
    for story in STORIES:
        (directory := tmp_path / story.__name__).mkdir()
        died_at += at_every_step(directory, story, [dice.randint(2, 10) for _ in range(2)])
    sent = died_at.total() - died_at["before Note prepare"] - died_at["half of prepare"]
    assert sent >= 200, died_at


def test_a_supervisor_that_speaks_before_it_writes_is_found(tmp_path):
    """The test of these tests: such a supervisor is harmless until it is killed in between."""
    with pytest.raises(SafetyViolated, match="not committed"):
        for step in range(STEPS_MAX):
            play(tmp_path / str(step), repair, [step], tell_before_it_is_written_down)
