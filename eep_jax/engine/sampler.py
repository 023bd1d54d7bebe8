"""Sampling of tokens, by keys that depend on request and position only."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt32

DIGIT_BITS = 3  # of a threshold that are found in one pass over the vocabulary
PASSES = 10  # for the 30 bits of a float32 from 0 to 1, which grow with it


def sample(
    logits: Float[Array, "B V"],
    seeds: UInt32[Array, "B 2"],
    positions: Int32[Array, "B"],
    temperature: Float32[Array, "B"],
    top_p: Float32[Array, "B"],
) -> Int32[Array, "B"]:
    """Greedy where the temperature is 0, else a draw from the fewest tokens with mass top_p.

    The key is `fold_in(seed, position)`, so a step run again, on any rank, draws the same token.
    A greedy batch costs one argmax.
    """
    logits = logits.astype(jnp.float32)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw():
        scaled = logits / jnp.maximum(temperature, 1e-6)[:, None]
        cut = (temperature > 0) & (top_p < 1)
        everything = lambda: jnp.ones(logits.shape, jnp.bool_)
        some = lambda: nucleus(scaled, top_p) | ~cut[:, None]
        allowed = lax.cond(cut.any(), some, everything)
        drawn = jax.vmap(_draw_one)(jnp.where(allowed, scaled, -jnp.inf), seeds, positions)
        return jnp.where(temperature <= 0, greedy, drawn)

    return lax.cond((temperature > 0).any(), draw, lambda: greedy)


def _draw_one(logits, seed, position):
    key = jax.random.fold_in(jax.random.wrap_key_data(seed), position)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def nucleus(logits: Float32[Array, "B V"], top_p: Float32[Array, "B"]) -> Bool[Array, "B V"]:
    """The tokens before which less than top_p of the mass comes, the most likely ones first.

    Probabilities `[.5 .3 .15 .05]` and top_p .6 keep two. The most likely token always stays, also
    where top_p is so small that it is zero in float32; equally likely ones stay or go together.
    Nothing is sorted: the least probability that stays is found bit by bit, DIGIT_BITS in a pass.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    bits = lax.bitcast_convert_type(probabilities, jnp.uint32)
    digits = jnp.arange(1, 2**DIGIT_BITS, dtype=jnp.uint32)

    def mass_above(thresholds: UInt32[Array, "B N"]) -> Float32[Array, "B N"]:
        above = bits[:, None, :] > thresholds[:, :, None]
        return jnp.sum(jnp.where(above, probabilities[:, None, :], 0), axis=-1)

    # The largest number above which lies a mass of at least top_p, digit by digit.
    last = jnp.zeros(top_p.shape, jnp.uint32)
    for shift in reversed(range(0, PASSES * DIGIT_BITS, DIGIT_BITS)):
        enough = mass_above(last[:, None] + (digits << shift)[None]) >= top_p[:, None]
        last += jnp.sum(enough, axis=-1).astype(jnp.uint32) << shift
    cut = mass_above(jnp.zeros_like(last)[:, None])[:, 0] >= top_p
    first_kept = jnp.where(cut, last + 1, 0)
    most_likely = probabilities == jnp.max(probabilities, axis=-1, keepdims=True)
    return (bits >= first_kept[:, None]) | most_likely
