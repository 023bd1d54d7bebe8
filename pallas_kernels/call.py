"""What every exchange of a step is told beside its data, and what it says back."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, UInt32

from pallas_kernels.signals import next_round


def address_words(address: int) -> np.ndarray:
    """The low and the high half of an address, uint32 [2]."""
    return np.array([address & 0xFFFFFFFF, address >> 32], np.uint32)


@jax.tree_util.register_dataclass
@typing.no_type_check  # leaves may be abstract under tree.map
@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """Travels through a step; all leaves are jit arguments, so their values never recompile.

    `suspicion[r]` becomes 1 when a wait for rank r timed out; later exchanges of the step leave
    that rank out, so a step has one timeout and not one per layer. The own entry says that the step
    was aborted: a later epoch is being prepared, and the remaining exchanges return at once.
    """

    rank: Int32[Array, ""]  # this one
    active: Int32[Array, "R"]  # 1 for the ranks of this epoch
    epoch: UInt32[Array, ""]
    round: UInt32[Array, ""]
    deadline_ms: UInt32[Array, ""]
    vote: UInt32[Array, ""]  # this rank's vote for the kind of the next step
    suspicion: Int32[Array, "R"]
    # Low and high half of the address at which a GPU reads this rank's abort word; unused on CPU.
    abort_address: UInt32[Array, "2"] = dataclasses.field(
        default_factory=lambda: np.zeros(2, np.uint32)
    )

    def scalars(self) -> UInt32[Array, "5"]:
        """Rank, epoch, round, deadline and vote in one array, as exchanges on a host take them."""
        words = (self.rank, self.epoch, self.round, self.deadline_ms, self.vote)
        return jnp.stack([jnp.asarray(word, jnp.uint32) for word in words])

    def after(self, suspicion: Int32[Array, "R"]) -> "Call":
        return dataclasses.replace(self, suspicion=suspicion)

    def next(self) -> "Call":
        return dataclasses.replace(self, round=next_round(self.round))
