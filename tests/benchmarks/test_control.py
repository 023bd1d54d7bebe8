"""Simulated ranks bring the supervisor's own code through whole epoch changes."""

import pytest

from benchmarks.bench_control import Simulation
from eep_jax.placement.placement import missing_experts
from tests.benchmarks.processes import run_module


@pytest.mark.parametrize("ranks, experts, redundancy", [(2, 3, 1), (8, 16, 2), (32, 24, 2)])
def test_a_death_and_a_return_end_in_an_epoch_that_covers_all_experts(ranks, experts, redundancy):
    simulation = Simulation(ranks, experts, redundancy)
    for rank in (0, ranks - 1):
        epoch = simulation.state.view.epoch
        assert simulation.kill(rank) > 0
        members = set(range(ranks)) - {rank}
        assert set(simulation.state.view.in_epoch) == members
        assert not missing_experts(simulation.state.placement, members)
        assert simulation.admit(rank) > 0
        assert set(simulation.state.view.in_epoch) == set(range(ranks))
        assert simulation.state.view.epoch >= epoch + 2
    assert simulation.bytes_sent > 0


@pytest.mark.timeout(60)
def test_as_a_command():
    done = run_module(
        "benchmarks.bench_control", "--ranks=16", "--experts=16", "--samples=1", deadline_s=50
    )
    assert done.returncode == 0 and "repair: p50" in done.stdout, done.stdout
