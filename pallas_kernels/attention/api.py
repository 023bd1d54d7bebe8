"""Attention of a step's queries to cached keys and values, inside a compiled step."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.attention.plan import GROUP_ROWS, PAGE_TOKENS
from pallas_kernels.attention.reference import attention_reference
from pallas_kernels.device import platform

CHANNELS = (64, 128)  # of a head


def fits(query_heads: int, kv_heads: int, channels: int, context: int) -> bool:
    """Whether `attend` takes heads and caches of this shape."""
    return (
        channels in CHANNELS
        and query_heads % kv_heads == 0
        and query_heads // kv_heads <= GROUP_ROWS
        and context % PAGE_TOKENS == 0
    )


def attend(
    q: Float[Array, "T Hq C"],
    keys: Float[Array, "B Hkv P C"],
    values: Float[Array, "B Hkv P C"],
    positions: Int32[Array, "T"],
    items: Int32[Array, "W 5"],
    count: Int32[Array, "1"],
    *,
    scale: float | None = None,
    window: int = 0,
    sinks: Float[Array, "Hq"] | None = None,
) -> Float[Array, "T Hq C"]:
    """Each token's attention to the cache of its sequence; off the GPU by the reference.

    On a GPU (Hopper) a row's bits depend on its query, its keys and its position alone: not on
    other rows, nor on whether it is one of a decode step or of a prompt.

    Args:
        q: queries of the step's tokens.
        keys, values: caches of B sequences of P positions.
        positions: position of each token; it sees positions up to its own.
        items, count: what `plan.plan_items` made of the tokens' sequences and positions, and how
            many of them there are. Rows in none of them are undefined.
        scale: factor of the scores, `C ** -0.5` unless given.
        window: if not 0, only the last so many positions are seen.
        sinks: scores that take part in the softmax and have no value.

    Raises:
        NotImplementedError: Heads that do not satisfy `fits`.
    """
    (_, query_heads, channels), (batch, kv_heads, context, _) = q.shape, keys.shape
    if not fits(query_heads, kv_heads, channels, context):
        raise NotImplementedError(
            f"{query_heads} heads of {channels} channels over {kv_heads} key heads and {context} "
            f"positions: the kernel needs {CHANNELS} channels, up to {GROUP_ROWS} heads for a key "
            f"head, and positions in multiples of {PAGE_TOKENS}"
        )
    scale = channels**-0.5 if scale is None else scale
    pages = context // PAGE_TOKENS
    if platform() != "gpu":
        table = jnp.arange(batch * pages).reshape(batch, pages)
        split = lambda cache: cache.reshape(batch, kv_heads, pages, PAGE_TOKENS, channels)
        paged = lambda cache: (
            split(cache).swapaxes(1, 2).reshape(-1, kv_heads, PAGE_TOKENS, channels)
        )
        places = table, sequences_of(items, count, len(q)), positions
        options = {"scale": scale, "window": window, "sinks": sinks}
        return attention_reference(q, paged(keys), paged(values), *places, **options)
    # Imported here: the CPU path needs nothing of Mosaic GPU.
    from pallas_kernels.attention.mosaic_gpu import attend_mosaic

    table = jnp.arange(batch)[:, None] * (kv_heads * pages) + jnp.arange(pages)
    paged = lambda cache: cache.reshape(-1, PAGE_TOKENS, channels)
    return attend_mosaic(
        q,
        paged(keys),
        paged(values),
        table.astype(jnp.int32),
        items,
        count,
        positions,
        kv_heads=kv_heads,
        head_stride=pages,
        scale=scale,
        window=window,
        sinks=sinks,
    )


def sequences_of(
    items: Int32[Array, "W 5"], count: Int32[Array, "1"], tokens: int
) -> Int32[Array, "T"]:
    """The sequence of each token, as the items say; 0 for a row that is in none."""
    row, queries, sequence = items[:, 0], items[:, 1], items[:, 2]
    inside = jnp.arange(tokens)
    own = (inside >= row[:, None]) & (inside < (row + queries)[:, None])
    own &= (jnp.arange(len(items)) < count[0])[:, None]
    return jnp.max(jnp.where(own, sequence[:, None], 0), axis=0)
