"""The experts of a rank over received rows, choice by choice in plain JAX: the specification."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def expert_gemm_reference(
    rows: Float[Array, "R T D"], slots: Int32[Array, "R T K"], bank: Float[Array, "S 3 F D"]
) -> Float[Array, "R T K D"]:
    """`y[s, t, k] = down(silu(gate(x)) * up(x))`, x = rows[s, t], of `slots[s, t, k]`; 0 for -1.

    `bank[slot]` holds gate `[F D]`, up `[F D]` and the transpose of down `[F D]`.
    """
    gate, up, down = jnp.moveaxis(bank, 1, 0)
    hidden = jax.nn.silu(jnp.einsum("std,pfd->stpf", rows, gate))
    hidden = hidden * jnp.einsum("std,pfd->stpf", rows, up)
    every_slot = jnp.einsum("stpf,pfd->stpd", hidden, down)
    chosen = jnp.take_along_axis(every_slot, jnp.maximum(slots, 0)[..., None], axis=2)
    return jnp.where((slots >= 0)[..., None], chosen, 0)
