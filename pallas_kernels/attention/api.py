"""Attention of a step's queries to cached keys and values, inside a compiled step."""

import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int32

from pallas_kernels.attention.plan import GROUP_ROWS, PAGE_TOKENS
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
    q: BFloat16[Array, "T Hq C"],
    keys: BFloat16[Array, "B Hkv P C"],
    values: BFloat16[Array, "B Hkv P C"],
    positions: Int32[Array, "T"],
    items: Int32[Array, "W 5"],
    count: Int32[Array, "1"],
    *,
    scale: float | None = None,
    window: int = 0,
    sinks: Float[Array, "Hq"] | None = None,
) -> BFloat16[Array, "T Hq C"]:
    """Each token's attention to the cache of its sequence, on a GPU (Hopper).

    A row's bits depend on its query, its keys and its position alone: not on other rows, nor on
    whether it is one of a decode step or of a prompt.

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
        NotImplementedError: not on a GPU, or heads that do not satisfy `fits`.
    """
    (_, query_heads, channels), (batch, kv_heads, context, _) = q.shape, keys.shape
    if platform() != "gpu" or not fits(query_heads, kv_heads, channels, context):
        raise NotImplementedError(
            f"{query_heads} heads of {channels} channels over {kv_heads} key heads and {context} "
            f"positions on {platform()}: the kernel needs a GPU, {CHANNELS} channels, and "
            f"positions in multiples of {PAGE_TOKENS}"
        )
    # Imported here: the CPU path needs nothing of Mosaic GPU.
    from pallas_kernels.attention.mosaic_gpu import attend_mosaic

    pages = context // PAGE_TOKENS
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
        scale=channels**-0.5 if scale is None else scale,
        window=window,
        sinks=sinks,
    )
