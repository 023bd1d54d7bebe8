"""Logits to tokens, by a key that depends on request and position only."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, UInt32


def sample(
    logits: Float[Array, "B V"],
    seeds: UInt32[Array, "B 2"],
    positions: Int32[Array, "B"],
    temperature: Float32[Array, "B"],
    top_p: Float32[Array, "B"],
) -> Int32[Array, "B"]:
    """Greedy where the temperature is 0, else a draw from the fewest tokens with mass top_p.

    The key is `fold_in(seed, position)`, so a step run again, on any rank, draws the same token.
    """
    return jax.vmap(_sample_one)(logits, seeds, positions, temperature, top_p)


def _sample_one(logits, seed, position, temperature, top_p):
    logits = logits.astype(jnp.float32)
    scaled = logits / jnp.maximum(temperature, 1e-6)
    order = jnp.argsort(-scaled)
    probabilities = jax.nn.softmax(scaled)[order]
    # A token stays if the mass before it is below top_p. The most likely one always stays, also
    # where top_p is so small that it is zero in float32.
    kept = (jnp.cumsum(probabilities) - probabilities < top_p).at[0].set(True)
    allowed = jnp.zeros_like(kept).at[order].set(kept)
    key = jax.random.fold_in(jax.random.wrap_key_data(seed), position)
    drawn = jax.random.categorical(key, jnp.where(allowed, scaled, -jnp.inf))
    return jnp.where(temperature <= 0, jnp.argmax(logits), drawn).astype(jnp.int32)
