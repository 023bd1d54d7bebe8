"""Runs simulations by seed: first faults and safety, then no faults and liveness.

python -m tests.simulator.run --seed=7 --seeds=1000 --ranks=4
"""

import argparse
import random
import sys

from eep_jax.config import ClusterConfig
from eep_jax.coordination import coordinator
from tests.simulator import faults
from tests.simulator.checkers import is_well
from tests.simulator.cluster import Cluster
from tests.support.factories import some_cluster

TAIL_LINES = 40
MESSAGES_PER_S_MAX = 25  # of one rank, both ways: heartbeats are 5, the rest are changes


class Failed(AssertionError):
    """A seed broke a promise. The message holds the command that repeats it and the log's tail."""


def a_cluster(ranks: int, dice: random.Random) -> tuple[ClusterConfig, int]:
    """Room to lose one, several, or all but one rank, by seed; and the number of experts."""
    experts = dice.randint(1, 2 * ranks)
    fewest = -(-experts // ranks)
    slots = dice.randint(fewest, fewest + 3)
    config = some_cluster(
        ranks=ranks,
        slots_per_rank=slots,
        redundancy=dice.randint(1, max(1, min(ranks, ranks * slots // experts))),
        background_experts=dice.randint(0, 3),
        background_retry_ms=1_000,
        balance_every_ms=1_000,
        policy="degrade" if dice.random() < 0.2 else "fail_closed",
    )
    return config, experts


def simulate(
    seed: int,
    ranks: int,
    faults_ms: int = 15_000,
    calm_ms: int = 60_000,
    advance=coordinator.advance,
) -> Cluster:
    """One simulation. Raises Failed where a promise is broken; returns the cluster at its end."""
    dice = random.Random(seed)
    cluster = Cluster(*a_cluster(ranks, dice), seed, advance)
    try:
        _disturb(cluster, dice, faults_ms)
        faults.heal(cluster)
        cluster.log("all faults are over")
        cluster.run_for(2_000)  # what was said before is heard by now
        assert cluster.run_for(calm_ms, until=lambda: is_well(cluster)), "the cluster did not heal"
        epoch = cluster.supervisor.state.view.epoch
        cluster.run_for(3_000)
        assert is_well(cluster) and cluster.supervisor.state.view.epoch == epoch, "it did not last"
        assert cluster.network.messages <= MESSAGES_PER_S_MAX * _process_seconds(cluster), "babble"
    except Exception as error:
        command = f"python -m tests.simulator.run --seed={seed} --ranks={ranks}"
        raise Failed("\n".join([str(error), *cluster.lines[-TAIL_LINES:], command])) from error
    return cluster


def _process_seconds(cluster: Cluster) -> float:
    return max(cluster.config.ranks, len(cluster.living())) * cluster.now_ms / 1_000


def _disturb(cluster: Cluster, dice: random.Random, duration_ms: int) -> None:
    cluster.timing.warm_up_range_ms = (50, 1_500)
    cluster.timing.move_range_ms = (10, 100)
    cluster.timing.respawn_range_ms = (100, 3_000)
    cluster.timing.backup_experts = dice.choice((0, 1, cluster.experts))
    cluster.network.delay_ms = (1, 20)
    for rank in range(cluster.config.ranks):
        cluster.spawn(rank)
    pace_ms = dice.choice((300, 1_000, 3_000))
    cluster.run_for(dice.randint(0, 3_000))
    end_ms = cluster.now_ms + duration_ms
    while cluster.now_ms < end_ms:
        faults.inject(cluster, dice)
        cluster.run_for(dice.randint(1, 2 * pace_ms))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds")
    parser.add_argument("--ranks", type=int, default=4)
    arguments = parser.parse_args()
    epochs = 0
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        try:
            cluster = simulate(seed, arguments.ranks)
        except Failed as failed:
            print(failed)
            return 1
        epochs += len(cluster.checkers.committed)
    print(f"{arguments.seeds} seeds, {epochs} epochs committed, every promise kept")
    return 0


if __name__ == "__main__":
    sys.exit(main())
