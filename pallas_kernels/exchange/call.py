"""Arguments of an exchange beside its rows: what is compiled into it, and what is data."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt32

from pallas_kernels.exchange.signals import next_round
from pallas_kernels.window import WindowLayout


@dataclasses.dataclass(frozen=True)
class ExchangeSpec:
    """Compile-time part of an exchange; the same on all ranks, so that they share executables.

    Args:
        layout: offsets of a rank's window.
        slots_per_rank: S; flat slot i is slot `i % S` of rank `i // S`.
        slab_bytes: distance between slabs where the step is given only the head of the heap; 0
            for the row length of the heap array.
    """

    layout: WindowLayout
    slots_per_rank: int
    slab_bytes: int = 0

    @property
    def ranks(self) -> int:
        return self.layout.ranks


class Choices(typing.NamedTuple):
    """Slot and weight of each choice, of own tokens `[T K]` or of received rows `[R T K]`.

    Slots are flat ids for own tokens, slots of this rank for received rows; -1 marks a choice that
    has no live replica, or runs on another rank.
    """

    slots: Int32[Array, "*T K"]
    weights: Float32[Array, "*T K"]


def address_words(address: int) -> np.ndarray:
    """The low and the high half of an address, uint32 [2]."""
    return np.array([address & 0xFFFFFFFF, address >> 32], np.uint32)


@jax.tree_util.register_dataclass
@typing.no_type_check  # leaves may be abstract under tree.map
@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """Run-time part of an exchange. All leaves are jit arguments: their values never recompile.

    `suspicion[r]` becomes 1 when a wait for rank r times out; later exchanges of the step skip that
    rank, so a step has one timeout, not one per layer. `suspicion[rank]` is 1 if the step was
    aborted: a later epoch is being prepared, and the remaining exchanges return at once.
    """

    rank: Int32[Array, ""]  # the calling rank
    active: Int32[Array, "R"]  # 1 for the ranks of this epoch
    epoch: UInt32[Array, ""]
    round: UInt32[Array, ""]
    deadline_ms: UInt32[Array, ""]
    vote: UInt32[Array, ""]  # this rank's vote for the kind of the next step
    suspicion: Int32[Array, "R"]
    # Low and high half of the device address of this rank's abort word; unused on CPU.
    abort_address: UInt32[Array, "2"] = dataclasses.field(
        default_factory=lambda: np.zeros(2, np.uint32)
    )

    def scalars(self) -> UInt32[Array, "5"]:
        """Rank, epoch, round, deadline and vote in one array, for exchanges on a host."""
        words = (self.rank, self.epoch, self.round, self.deadline_ms, self.vote)
        return jnp.stack([jnp.asarray(word, jnp.uint32) for word in words])

    def after(self, suspicion: Int32[Array, "R"]) -> "Call":
        """The same exchange with this suspicion."""
        return dataclasses.replace(self, suspicion=suspicion)

    def next(self) -> "Call":
        """The call of the next round."""
        return dataclasses.replace(self, round=next_round(self.round))
