"""The experts of a rank over received rows, choice by choice in plain JAX: the specification."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.expert_gemm.mlp import SWIGLU, ExpertMlp


def expert_gemm_reference(
    rows: Float[Array | np.ndarray, "R T D"],
    slots: Int32[Array | np.ndarray, "R T K"],
    bank: Float[Array | np.ndarray, "S 3 F D"],
    mlp: ExpertMlp = SWIGLU,
) -> Float[Array, "R T K D"]:
    """`y[s, t, k] = down(silu(gate(x)) * up(x))`, x = rows[s, t], of `slots[s, t, k]`; 0 for -1.

    `bank[slot]` holds gate `[F D]`, up `[F D]` and the transpose of down `[F D]`; `mlp` may add
    biases or name another activation.
    """
    weights, biases = mlp.split(bank)
    gate_bias, up_bias, down_bias = biases or (0, 0, 0)
    gate, up, down = jnp.moveaxis(weights, 1, 0)
    gated = jnp.einsum("std,pfd->stpf", rows, gate) + gate_bias
    hidden = mlp.activate(gated, jnp.einsum("std,pfd->stpf", rows, up) + up_bias)
    every_slot = jnp.einsum("stpf,pfd->stpd", hidden, down) + down_bias
    chosen = jnp.take_along_axis(every_slot, jnp.maximum(slots, 0)[..., None], axis=2)
    return jnp.where((slots >= 0)[..., None], chosen, 0)
