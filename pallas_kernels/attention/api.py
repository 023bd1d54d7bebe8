"""Attention of a step's queries to cached keys and values, inside a compiled step."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.attention.plan import GROUP_ROWS, PAGE_TOKENS
from pallas_kernels.attention.reference import attention_reference
from pallas_kernels.device import platform

CHANNELS = (64, 128)  # of a head


def fits(query_heads: int, kv_heads: int, channels: int, page_tokens: int) -> bool:
    """Whether `attend` takes heads and pages of this shape."""
    return (
        channels in CHANNELS
        and query_heads % kv_heads == 0
        and query_heads // kv_heads <= GROUP_ROWS
        and page_tokens == PAGE_TOKENS
    )


def attend(
    q: Float[Array, "T Hq C"],
    keys: Float[Array, "N Hkv G C"],
    values: Float[Array, "N Hkv G C"],
    table: Int32[Array, "B J"],
    positions: Int32[Array, "T"],
    items: Int32[Array, "W 5"],
    count: Int32[Array, "1"],
    *,
    scale: float | None = None,
    window: int = 0,
    sinks: Float[Array, "Hq"] | None = None,
) -> Float[Array, "T Hq C"]:
    """Each token's attention to the pages of its sequence; off the GPU by the reference.

    On a GPU (Hopper) a row's bits depend on its query, its keys and its position alone: not on
    other rows, nor on whether it is one of a decode step or of a prompt.

    Args:
        q: queries of the step's tokens.
        keys, values: N pages of G positions.
        table: the pages of each of B sequences, in order of position; entries beyond what a
            sequence's tokens see may be any page.
        positions: position of each token; it sees positions up to its own.
        items, count: what `plan.plan_items` made of the tokens' sequences and positions, and how
            many of them there are. Rows in none of them are undefined.
        scale: factor of the scores, `C ** -0.5` unless given.
        window: if not 0, only the last so many positions are seen.
        sinks: scores that take part in the softmax and have no value.

    Raises:
        NotImplementedError: Heads or pages that do not satisfy `fits`.
    """
    (_, query_heads, channels), (_, kv_heads, page_tokens, _) = q.shape, keys.shape
    if not fits(query_heads, kv_heads, channels, page_tokens):
        raise NotImplementedError(
            f"{query_heads} heads of {channels} channels over {kv_heads} key heads and pages of "
            f"{page_tokens} positions: the kernel needs {CHANNELS} channels, up to {GROUP_ROWS} "
            f"heads for a key head, and pages of {PAGE_TOKENS}"
        )
    options = {
        "scale": channels**-0.5 if scale is None else scale,
        "window": window,
        "sinks": sinks,
    }
    if platform() != "gpu":
        places = table, sequences_of(items, count, len(q)), positions
        return attention_reference(q, keys, values, *places, **options)
    # Imported here: the CPU path needs nothing of Mosaic GPU.
    from pallas_kernels.attention.mosaic_gpu import attend_mosaic

    by_head = lambda cache: cache.reshape(-1, PAGE_TOKENS, channels)
    work = table * kv_heads, items, count, positions
    return attend_mosaic(q, by_head(keys), by_head(values), *work, kv_heads=kv_heads, **options)


def sequences_of(
    items: Int32[Array, "W 5"], count: Int32[Array, "1"], tokens: int
) -> Int32[Array, "T"]:
    """The sequence of each token, as the items say; 0 for a row that is in none."""
    row, queries, sequence = items[:, 0], items[:, 1], items[:, 2]
    inside = jnp.arange(tokens)
    own = (inside >= row[:, None]) & (inside < (row + queries)[:, None])
    own &= (jnp.arange(len(items)) < count[0])[:, None]
    return jnp.max(jnp.where(own, sequence[:, None], 0), axis=0)
