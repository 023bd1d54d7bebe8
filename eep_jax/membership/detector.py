"""Failure detector: one verdict per rank from all signs, with its reason in words."""

import dataclasses

from eep_jax.config import ClusterConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signs:
    """All observations of one member. Times are milliseconds of the judge's clock."""

    rank: int
    ended: bool = False  # its process is known to have ended
    ending: bool = False  # its process runs no more code, but the kernel still dismantles it
    heard_ms: int = 0  # last message of any kind
    channel_lost_ms: int | None = None  # None while its control channel is open
    stalled_ms: int = 0  # time since its engine loop moved, as last reported
    accused_by: tuple[int, ...] = ()  # ranks whose step timed out on it in this epoch
    joining: bool = False  # no member, and has not offered itself yet


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`dead` is final for this incarnation, else it counts as alive. `reason` is a sentence."""

    rank: int
    dead: bool
    reason: str


def lease_of(joining: bool, accused_by: tuple[int, ...], limits: ClusterConfig) -> int:
    """Milliseconds of silence after which a rank is dead.

    Args:
        joining: It is no member and has not offered itself: nobody waits for it, and members may
            leave it little processor time while it loads.
        accused_by: Ranks whose step timed out on it.
        limits: `joining_lease_ms`, `accused_lease_ms` and `lease_ms` are used.

    >>> limits = ClusterConfig(ranks=4, slots_per_rank=2)
    >>> [lease_of(joining, accused, limits) for joining, accused in ((True, ()), (False, (0,)))]
    [60000, 1500]
    """
    if joining:
        return limits.joining_lease_ms
    return limits.accused_lease_ms if accused_by else limits.lease_ms


def judge(now_ms: int, signs: Signs, limits: ClusterConfig) -> Verdict:
    """Decides from all signs. A peer's suspicion alone never kills: it only shortens the lease.

    Args:
        now_ms: Time on the clock of `signs`.
        signs: All observations of the rank.
        limits: The leases (see `lease_of`), `channel_grace_ms` and `stall_ms` are used.

    >>> limits = ClusterConfig(ranks=4, slots_per_rank=2, lease_ms=3_000)
    >>> judge(5_000, Signs(rank=2, heard_ms=4_900, accused_by=(0,)), limits).dead
    False
    """
    silent_ms = now_ms - signs.heard_ms
    lease_ms = lease_of(signs.joining, signs.accused_by, limits)
    accusers = f" and ranks {list(signs.accused_by)} accuse it" if signs.accused_by else ""
    dead = lambda reason: Verdict(signs.rank, True, f"rank {signs.rank} {reason}")
    if signs.ended:
        return dead("ended: its process exited")
    if signs.ending:
        return dead("is ending: its process was killed or exits")
    if silent_ms > lease_ms:
        return dead(f"was silent for {silent_ms} ms, longer than {lease_ms} ms{accusers}")
    if signs.channel_lost_ms is not None:
        lost_ms = now_ms - signs.channel_lost_ms
        grace_ms = limits.channel_grace_ms
        if lost_ms > grace_ms:
            return dead(f"lost its channel {lost_ms} ms ago, longer than {grace_ms} ms{accusers}")
    if signs.stalled_ms > limits.stall_ms:
        return dead(
            f"is stuck: its engine did not move for {signs.stalled_ms} ms, longer than "
            f"{limits.stall_ms} ms{accusers}"
        )
    if signs.accused_by:
        reason = f"rank {signs.rank} sent its last message {silent_ms} ms ago{accusers}"
        return Verdict(signs.rank, False, reason)
    return Verdict(signs.rank, False, f"rank {signs.rank} is well")
