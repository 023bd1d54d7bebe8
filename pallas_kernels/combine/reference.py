"""Combine for all ranks at once, in plain JAX: the specification."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32


def combine_reference(
    results: Float[Array | np.ndarray, "R R T K D"],
    slots: Int32[Array | np.ndarray, "R T K"],
    weights: Float32[Array | np.ndarray, "R T K"],
    active: Int32[Array | np.ndarray, "R"],
    slots_per_rank: int,
    mode: str = "per_choice",
) -> Float32[Array, "R T D"]:
    """`y[s, t] = sum_k weights[s, t, k] * results[rank of choice k, s, t, k]`, in float32.

    `results[d, s, t, k]` is what rank d computed for choice k of token t of source s. A choice
    without a slot, or on an inactive rank, adds nothing. `per_choice` adds in the order of k,
    whatever the placement; `per_rank` first sums on each rank, then over ranks in their order.
    """
    ranks, tokens, choices = slots.shape
    owner = jnp.where(slots >= 0, slots // slots_per_rank, 0)
    valid = (slots >= 0) & (active[owner] > 0) & (active[:, None, None] > 0)
    share = jnp.where(valid, weights, 0.0)
    source = jnp.arange(ranks)[:, None, None]
    token = jnp.arange(tokens)[None, :, None]
    choice = jnp.arange(choices)[None, None, :]
    home = jnp.where(valid[..., None], results[owner, source, token, choice], 0)
    terms = share[..., None] * home.astype(jnp.float32)
    if mode == "per_choice":
        total = terms[:, :, 0]
        for k in range(1, choices):
            total = total + terms[:, :, k]
        return total
    total = jnp.zeros_like(terms[:, :, 0])
    for rank in range(ranks):
        total = total + jnp.where((owner == rank)[..., None], terms, 0).sum(axis=2)
    return total
