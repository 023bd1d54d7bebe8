"""Moves between Views. Each checks, changes, checks, and returns a new View.

                offer              admit               suspect
    absent ────────────▶ joining ◀───────▶ active ◀──────────────▶ suspect
       ▲                    │     stand_by            clear           │
       ├──── withdraw ──────┘                                         │
       └───────────────────────── evict ──────────────────────────────┘

Only `admit`, `stand_by` and `evict` change the participants of a step, so only they start a new
epoch.
"""

import dataclasses

from eep_jax.errors import InvalidMove
from eep_jax.membership.view import Member, RankState, View, check


def offer(view: View, rank: int, incarnation: int) -> View:
    """A new process of an absent rank is ready to load. Its incarnation must be new."""
    member = _expect(view, rank, RankState.ABSENT, "offer itself")
    if incarnation <= member.incarnation:
        raise InvalidMove(
            f"rank {rank} offers incarnation {incarnation}, but {member.incarnation} was already "
            "seen; only a newer process may join"
        )
    return _with(view, rank, Member(RankState.JOINING, incarnation))


def withdraw(view: View, rank: int) -> View:
    """A joining rank is lost before it was admitted. Its incarnation is used up."""
    member = _expect(view, rank, RankState.JOINING, "be withdrawn")
    return _with(view, rank, dataclasses.replace(member, state=RankState.ABSENT))


def admit(view: View, rank: int) -> View:
    """A joining rank takes part. `2:joining` at epoch 8 becomes `2:active` at epoch 9."""
    member = _expect(view, rank, RankState.JOINING, "be admitted")
    changed = _with(view, rank, dataclasses.replace(member, state=RankState.ACTIVE))
    return dataclasses.replace(changed, epoch=view.epoch + 1)


def stand_by(view: View, rank: int) -> View:
    """A member leaves and its process stays. `2:active` at epoch 9 is `2:joining` at epoch 10."""
    member = _expect(view, rank, RankState.ACTIVE, "stand by")
    changed = _with(view, rank, dataclasses.replace(member, state=RankState.JOINING))
    return dataclasses.replace(changed, epoch=view.epoch + 1)


def suspect(view: View, rank: int) -> View:
    """A rank is presumed dead. Nothing moves until it is evicted; the epoch stays."""
    member = _expect(view, rank, RankState.ACTIVE, "be suspected")
    return _with(view, rank, dataclasses.replace(member, state=RankState.SUSPECT))


def clear(view: View, rank: int) -> View:
    """A suspect has proved to be alive."""
    member = _expect(view, rank, RankState.SUSPECT, "be cleared")
    return _with(view, rank, dataclasses.replace(member, state=RankState.ACTIVE))


def evict(view: View, rank: int) -> View:
    """Removes a suspect. `1:active 2:suspect` at epoch 7 becomes `1:active 2:absent` at epoch 8."""
    member = _expect(view, rank, RankState.SUSPECT, "be evicted")
    changed = _with(view, rank, dataclasses.replace(member, state=RankState.ABSENT))
    return dataclasses.replace(changed, epoch=view.epoch + 1)


def at_epoch(before: View, after: View, epoch: int) -> View:
    """`after`, several moves from `before`, as one change under one epoch.

    Epochs of abandoned changes are never reused, so `epoch` may lie further ahead.
    """
    if epoch <= before.epoch:
        raise InvalidMove(f"epoch {epoch} does not follow {before.epoch}; epochs only grow")
    return check(dataclasses.replace(after, epoch=epoch))


def _expect(view: View, rank: int, state: RankState, action: str) -> Member:
    check(view)
    if rank not in view.ranks:
        raise InvalidMove(f"rank {rank} is not in 0..{len(view.members) - 1}")
    member = view.members[rank]
    if member.state is not state:
        raise InvalidMove(
            f"rank {rank} is {member.state.value}, only a rank that is {state.value} can {action}"
        )
    return member


def _with(view: View, rank: int, member: Member) -> View:
    members = view.members[:rank] + (member,) + view.members[rank + 1 :]
    return check(dataclasses.replace(view, members=members))
