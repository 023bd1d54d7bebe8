"""Attention to the pages of a KV cache in plain JAX, a block of positions at a time.

Blocks are taken from the sequence's start and summed in their order, by the usual running softmax.
Each token is a separate batch entry of the products, so its result has the same bits whatever the
other tokens are, and whichever step it is in. A step reads the blocks up to the last position that
a token of it sees, not the whole context.

On a GPU `pallas_kernels.attention` takes the place of this wherever its shapes fit.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from eep_jax.models.memory import BLOCK_TOKENS

LOWEST = (
    -1e30
)  # of a running maximum: finite, so that a block without a visible key changes nothing

# (keys, values) of a block -> scores `[T H g b]` in float32, and the values `[T H b C]`.
Block = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def attend_pages(
    q: Float[Array, "T Hq C"],
    keys: Float[Array, "N Hkv G C"],
    values: Float[Array, "N Hkv G C"],
    pages: Int32[Array, "T J"],
    positions: Int32[Array, "T"],
    *,
    scale: float | None = None,
    window: int = 0,
    sinks: Float[Array, "Hq"] | None = None,
) -> Float[Array, "T Hq C"]:
    """Attention of T tokens to the cached positions `<= positions[t]` of their sequences.

    Args:
        q: queries, rotated.
        keys, values: the cache of this layer, pages of G positions.
        pages: the pages of each token's sequence, in order of position. Entries for positions that
            the token does not see may be any page.
        positions: position of each token.
        scale: factor of the scores, `C ** -0.5` unless given.
        window: if not 0, only the last so many positions are seen.
        sinks: scores that take part in the softmax and have no value.

    Returns:
        In q's dtype; scores and softmax are float32.

    Example: a token at position 2 of a sequence whose only page is page 1.

        >>> cache = jnp.ones((2, 1, 4, 8))
        >>> attend_pages(jnp.ones((1, 2, 8)), cache, cache, jnp.array([[1]]), jnp.array([2])).shape
        (1, 2, 8)
    """
    tokens, query_heads, channels = q.shape
    kv_heads = keys.shape[1]
    grouped = q.reshape(tokens, kv_heads, query_heads // kv_heads, channels)
    factor = channels**-0.5 if scale is None else scale

    def block(k, v):
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        return product("thgc,thpc->thgp", grouped, k) * factor, v

    by_head = None if sinks is None else sinks.astype(jnp.float32).reshape(kv_heads, -1)
    out = _by_blocks(block, (keys, values), pages, positions, grouped, channels, window, by_head)
    return out.astype(q.dtype).reshape(tokens, query_heads, channels)


def attend_latent_pages(
    q: Float[Array, "T Hq Q"],
    keys: Float[Array, "N 1 G Cr"],
    latents: Float[Array, "N 1 G Ckv"],
    pages: Int32[Array, "T J"],
    positions: Int32[Array, "T"],
    *,
    scale: float,
) -> Float[Array, "T Hq Ckv"]:
    """`attend_pages` for latent attention, where Q is Ckv + Cr: see `latent_attention`.

    The values are the latents, and the scores are products with the latents and the rotated keys.
    """
    rank = latents.shape[-1]
    by_latent, by_key = q[:, None, :, :rank], q[:, None, :, rank:]

    def block(k, v):
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        scores = product("thgc,thpc->thgp", by_latent, v)
        return (scores + product("thgc,thpc->thgp", by_key, k)) * scale, v

    out = _by_blocks(block, (keys, latents), pages, positions, by_latent, rank, 0, None)
    return out[:, 0].astype(q.dtype)


def _by_blocks(
    block: Block,
    cache: tuple[Float[Array, "N H G _k"], Float[Array, "N H G _v"]],
    pages: Int32[Array, "T J"],
    positions: Int32[Array, "T"],
    queries: Float[Array, "T H g _q"],
    channels: int,
    window: int,
    sinks: Float32[Array, "H g"] | None,
) -> Float32[Array, "T H g C"]:
    """Softmax of the scores of all blocks, times their values."""
    size = cache[0].shape[2]
    together = -(-BLOCK_TOKENS[jax.default_backend()] // size)  # pages of a block
    together = min(together, pages.shape[1])
    pages = jnp.pad(pages, ((0, 0), (0, -pages.shape[1] % together)))
    width = together * size

    def gather(part: jax.Array, numbers: jax.Array) -> jax.Array:
        found = jnp.moveaxis(part[numbers], 1, 2)
        return found.reshape(*found.shape[:2], width, part.shape[-1])

    def add(number, sums):
        total, top, weights = sums
        own = lax.dynamic_slice_in_dim(pages, number * together, together, axis=1)
        scores, v = block(*(gather(part, own) for part in cache))
        visible = seen(number * width + jnp.arange(width), positions, window)
        scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
        # What an earlier sequence left there may be NaN, and 0 x NaN is NaN.
        v = jnp.where(visible[:, None, :, None], v, 0)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        before, shares = jnp.exp(top - new_top), jnp.exp(scores - new_top[..., None])
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        added = product("thgp,thpc->thgc", shares.astype(v.dtype), v)
        weights = weights * before + jnp.sum(shares, axis=-1)
        return total * before[..., None] + added, new_top, weights

    shape = queries.shape[:3]
    nothing = jnp.zeros((*shape, channels), jnp.float32), jnp.zeros(shape, jnp.float32)
    if sinks is None:
        start = nothing[0], jnp.full(shape, LOWEST), nothing[1]
    else:
        top = jnp.broadcast_to(jnp.maximum(sinks, LOWEST), shape)
        start = nothing[0], top, jnp.exp(sinks - top)
    first = jnp.maximum(jnp.min(positions) - window + 1, 0) // width if window else 0
    total, _, weights = lax.fori_loop(first, jnp.max(positions) // width + 1, add, start)
    return total / weights[..., None]


def seen(
    places: Int32[Array, "_"], positions: Int32[Array, "T"], window: int = 0
) -> Bool[Array, "T _"]:
    """Mask of the positions P that each token attends to."""
    visible = places <= positions[:, None]
    return visible & (places > positions[:, None] - window) if window else visible
