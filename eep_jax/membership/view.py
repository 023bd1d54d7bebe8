"""Members of the cluster: an immutable View and its invariants."""

import dataclasses
import enum
import functools

from eep_jax.errors import InvalidMove


class RankState(enum.Enum):
    """State of a rank. Only `ACTIVE` and `SUSPECT` ranks are in the epoch."""

    ABSENT = "absent"  # not a member; its incarnation, if any, is fenced
    JOINING = "joining"  # offered itself, loads its experts, does not serve yet
    ACTIVE = "active"
    SUSPECT = "suspect"  # still in the epoch, until it is evicted or cleared


@dataclasses.dataclass(frozen=True)
class Member:
    """One rank in the View. `incarnation` counts its processes from 1; 0: it never had one."""

    state: RankState = RankState.ABSENT
    incarnation: int = 0


@dataclasses.dataclass(frozen=True)
class View:
    """One Member per rank, numbered by an epoch that only grows."""

    epoch: int
    members: tuple[Member, ...]

    @property
    def ranks(self) -> range:
        return range(len(self.members))

    @functools.cached_property  # read for every message of every rank
    def in_epoch(self) -> tuple[int, ...]:
        """Ranks that take part in the steps of this epoch, suspects included."""
        return tuple(filter(self.includes, self.ranks))

    def includes(self, rank: int) -> bool:
        """Whether the rank takes part in the steps of this epoch, as `in_epoch` lists them."""
        return self.members[rank].state in (RankState.ACTIVE, RankState.SUSPECT)

    def with_state(self, state: RankState) -> tuple[int, ...]:
        """Ranks in the given state, ascending."""
        return tuple(r for r in self.ranks if self.members[r].state is state)

    def __str__(self) -> str:
        members = (f"{r}:{m.state.value}" for r, m in enumerate(self.members))
        return f"epoch={self.epoch} " + " ".join(members)


def empty_view(ranks: int) -> View:
    """The View before any rank came: epoch 0, every rank absent."""
    return check(View(epoch=0, members=(Member(),) * ranks))


def check(view: View) -> View:
    """Returns the view, or raises InvalidMove naming the error in it."""
    if view.epoch < 0:
        raise InvalidMove(f"epoch {view.epoch} is negative")
    if not view.members:
        raise InvalidMove("a view needs at least one rank")
    for rank, member in enumerate(view.members):
        if member.incarnation < 0:
            raise InvalidMove(f"rank {rank} has incarnation {member.incarnation}, expected >= 0")
        if member.state is not RankState.ABSENT and member.incarnation == 0:
            raise InvalidMove(f"rank {rank} is {member.state.value} but has no incarnation")
    return view
