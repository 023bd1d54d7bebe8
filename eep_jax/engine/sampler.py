"""Sampling of tokens, by keys that depend on request and position only."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt32

DIGIT_BITS = 3  # of a threshold that are found in one pass over the vocabulary
KEY_DIGIT_BITS = 4  # same, of a threshold among all 32 bits
PASSES = 10  # for the 30 bits of a float32 from 0 to 1, which grow with it


def sample(
    logits: Float[Array, "B V"],
    seeds: UInt32[Array, "B 2"],
    positions: Int32[Array, "B"],
    temperature: Float32[Array, "B"],
    top_p: Float32[Array, "B"],
    top_k: Int32[Array, "B"] | None = None,
    min_p_log: Float32[Array, "B"] | None = None,
) -> Int32[Array, "B"]:
    """Greedy where the temperature is 0, else a draw from the fewest tokens with mass top_p.

    Before that, `top_k` keeps the k most likely tokens (0: all), and `min_p_log` those with at
    least exp(min_p_log) times the probability of the most likely one.
    The key is `fold_in(seed, position)`, so a step run again, on any rank, draws the same token.
    A greedy batch costs one argmax.
    """
    logits = logits.astype(jnp.float32)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw():
        scaled = logits / jnp.maximum(temperature, 1e-6)[:, None]
        if top_k is not None:
            scaled = narrow(scaled, top_k, min_p_log)
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


def narrow(
    logits: Float32[Array, "B V"], top_k: Int32[Array, "B"], min_p_log: Float32[Array, "B"]
) -> Float32[Array, "B V"]:
    """Logits with -inf for tokens outside the k most likely ones, or too far below the first."""

    def narrowed(logits):
        # The share is that of all tokens: top_k does not change the most likely one.
        least = jnp.max(logits, axis=-1, keepdims=True) + min_p_log[:, None]
        return jnp.where((logits >= least) & most_likely(logits, top_k), logits, -jnp.inf)

    wanted = (top_k > 0) | (min_p_log > -jnp.inf)
    return lax.cond(wanted.any(), narrowed, lambda same: same, logits)


def most_likely(logits: Float32[Array, "B V"], k: Int32[Array, "B"]) -> Bool[Array, "B V"]:
    """The k largest logits of each row, all where k is 0; those equal to the k-th stay, too.

    NaN counts as -inf. Nothing is sorted: see `nucleus`. The passes are written out, since a loop
    would keep the step from being one CUDA graph.
    """
    bits = lax.bitcast_convert_type(jnp.where(jnp.isnan(logits), -jnp.inf, logits), jnp.uint32)
    # Unsigned numbers in the order of the floats.
    keys = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))
    digits = jnp.arange(1, 2**KEY_DIGIT_BITS, dtype=jnp.uint32)

    last = jnp.zeros(k.shape, jnp.uint32)
    for shift in reversed(range(0, 32, KEY_DIGIT_BITS)):
        thresholds = last[:, None] + (digits << shift)[None]
        above = jnp.sum(keys[:, None, :] > thresholds[:, :, None], axis=-1, dtype=jnp.int32)
        last += jnp.sum(above >= k[:, None], axis=-1).astype(jnp.uint32) << shift
    return (keys > last[:, None]) | (k <= 0)[:, None]


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
