"""The faults of a simulation: each is one act, drawn from the seed; most end by themselves."""

import random

from eep_jax.coordination.participant import StepAccused
from eep_jax.coordination.protocol import Mode
from eep_jax.coordination.scaling import ScaleRequest, ranks_out
from eep_jax.coordination.state import Measured, ScaleTo
from eep_jax.errors import EepError
from tests.simulator.cluster import Cluster


def inject(cluster: Cluster, dice: random.Random) -> None:
    """Lets one fault happen now."""
    fault = dice.choices(list(FAULTS), weights=list(FAULTS.values()))[0]
    cluster.log(f"fault: {fault.__name__}")
    fault(cluster, dice)


def heal(cluster: Cluster) -> None:
    """Ends all faults. Processes that are gone or stuck are the cluster's own business."""
    cluster.network.heal()
    cluster.timing.heal()
    for process in cluster.living():
        process.stuck_since_ms = None
        process.wake()
    cluster.start_supervisor()
    cluster.supervisor.commands_left = None
    cluster.supervisor.wake()


def kill_rank(cluster: Cluster, dice: random.Random) -> None:
    if living := cluster.living():
        cluster.kill(dice.choice(living), unseen=dice.random() < 0.4)


def kill_two_ranks(cluster: Cluster, dice: random.Random) -> None:
    kill_rank(cluster, dice)
    kill_rank(cluster, dice)


def stop_rank(cluster: Cluster, dice: random.Random) -> None:
    """SIGSTOP, and SIGCONT a while later: before or after it was evicted."""
    if living := cluster.living():
        process = dice.choice(living)
        process.stopped = True
        cluster.after(dice.randint(100, 8_000), process.wake)


def stick_rank(cluster: Cluster, dice: random.Random) -> None:
    """The engine hangs, heartbeats go on."""
    if living := cluster.living():
        process = dice.choice(living)
        process.stuck_since_ms = cluster.now_ms
        cluster.after(dice.randint(100, 8_000), lambda: setattr(process, "stuck_since_ms", None))


def accuse_falsely(cluster: Cluster, dice: random.Random) -> None:
    serving = [p for p in cluster.living() if p.state.mode is Mode.SERVING and not p.stopped]
    if serving:
        process = dice.choice(serving)
        accused = dice.choice(process.state.view.in_epoch)
        process.feed(StepAccused(process.state.epoch, (accused,)))


def start_second_process(cluster: Cluster, dice: random.Random) -> None:
    cluster.spawn(dice.randrange(cluster.config.ranks))


def cut_ranks(cluster: Cluster, dice: random.Random) -> None:
    network, ranks = cluster.network, range(cluster.config.ranks)
    network.cut = frozenset(r for r in ranks if dice.random() < 0.4)
    cluster.after(dice.randint(200, 6_000), lambda: setattr(network, "cut", frozenset()))


def lose_messages(cluster: Cluster, dice: random.Random) -> None:
    network = cluster.network
    network.loss, network.repeats = dice.choice((0.1, 0.4, 0.8)), dice.choice((0.0, 0.3))
    cluster.after(dice.randint(200, 3_000), lambda: setattr(network, "loss", 0.02))


def delay_messages(cluster: Cluster, dice: random.Random) -> None:
    network = cluster.network
    network.delay_ms = (1, dice.choice((50, 400, 1_500)))
    cluster.after(dice.randint(500, 4_000), lambda: setattr(network, "delay_ms", (1, 20)))


def slow_repair(cluster: Cluster, dice: random.Random) -> None:
    timing = cluster.timing
    timing.move_range_ms = (10, dice.choice((500, 2_000)))
    cluster.after(dice.randint(500, 5_000), lambda: setattr(timing, "move_range_ms", (10, 100)))


def fail_fetches(cluster: Cluster, dice: random.Random) -> None:
    cluster.timing.peer_failure = dice.choice((0.2, 1.0))
    cluster.timing.checkpoint_failure = dice.choice((0.0, 0.05, 1.0))


def fail_backups(cluster: Cluster, dice: random.Random) -> None:
    """Shards that fail their digest, nodes that answer late; and memory that was lost."""
    cluster.timing.backup_failure = dice.choice((0.3, 1.0))
    if (living := cluster.living()) and dice.random() < 0.5:
        dice.choice(living).backups.clear()


def restart_supervisor(cluster: Cluster, dice: random.Random) -> None:
    """SIGKILL, at once or in the middle of its next commands; a new one comes a while later."""
    if cluster.supervisor is None:
        return
    if dice.random() < 0.5:
        cluster.kill_supervisor()
    else:
        cluster.supervisor.commands_left = dice.randint(0, 12)
    cluster.after(dice.randint(300, 6_000), cluster.start_supervisor)


def stop_supervisor(cluster: Cluster, dice: random.Random) -> None:
    if (supervisor := cluster.supervisor) is not None:
        supervisor.stopped = True
        cluster.after(dice.randint(300, 6_000), supervisor.wake)


def drain_a_rank(cluster: Cluster, dice: random.Random) -> None:
    """The operator's doing, not a fault; but it may come at any time."""
    _scale(
        cluster, ScaleRequest(action="scale_down", ranks=(dice.randrange(cluster.config.ranks),))
    )


def grow(cluster: Cluster, dice: random.Random) -> None:
    _scale(cluster, ScaleRequest(action="scale_up", count=1))


def _scale(cluster: Cluster, request: ScaleRequest) -> None:
    supervisor = cluster.supervisor
    if supervisor is None or supervisor.stopped:
        return
    try:
        out = ranks_out(supervisor.state, request)
    except EepError as error:
        cluster.log(f"refused: {error}")
        return
    supervisor.feed(ScaleTo(out))


def shift_load(cluster: Cluster, dice: random.Random) -> None:
    """The tokens of now like other experts than those of before."""
    if (supervisor := cluster.supervisor) is not None:
        experts = range(cluster.experts)
        supervisor.feed(Measured(tuple(dice.choice((0, 100, 5_000)) for _ in experts)))


FAULTS = {
    drain_a_rank: 4,
    grow: 3,
    shift_load: 4,
    kill_rank: 6,
    kill_two_ranks: 2,
    stop_rank: 5,
    stick_rank: 2,
    accuse_falsely: 3,
    start_second_process: 2,
    cut_ranks: 2,
    lose_messages: 4,
    delay_messages: 3,
    slow_repair: 3,
    fail_fetches: 2,
    fail_backups: 2,
    restart_supervisor: 5,
    stop_supervisor: 1,
}
