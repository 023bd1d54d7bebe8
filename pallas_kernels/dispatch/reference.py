"""Dispatch for all ranks at once, in plain JAX: the specification."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32


def dispatch_reference(
    x: Float[Array | np.ndarray, "R T D"],
    slots: Int32[Array | np.ndarray, "R T K"],
    active: Int32[Array | np.ndarray, "R"],
    slots_per_rank: int,
) -> tuple[Float[Array, "R R T D"], Int32[Array, "R R T K"]]:
    """`rows[d, s, t] = x[s, t]` if any choice of token t of source s is on rank d, else 0.

    `slots` are flat ids `rank * S + slot`, -1 for none. The second result is, for each destination
    and source, the slot on the destination, -1 if the choice runs elsewhere. Inactive ranks
    neither send nor receive. With S=8, a choice of slot 19 is slot 3 on rank 2.
    """
    ranks = x.shape[0]
    destination = jnp.arange(ranks)[:, None, None, None]
    here = (slots[None] >= 0) & (slots[None] // slots_per_rank == destination)
    both = (active[:, None] > 0) & (active[None, :] > 0)
    here = here & both[:, :, None, None]
    local = jnp.where(here, slots[None] % slots_per_rank, -1)
    return jnp.where(here.any(-1)[..., None], x[None], 0), local
