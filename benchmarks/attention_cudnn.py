"""Cached attention by cuDNN, which reads the used part of each sequence, not the whole cache.

`jax.nn.dot_product_attention` exposes neither page tables nor, in float32, the log-sum-exp that
sinks need; so this module calls the internal entry into cuDNN beneath it.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Int32

from eep_jax.jax_internals import cudnn_attention as fused

CHANNELS_MAX, CHANNELS_MULTIPLE = 128, 8  # per head, of cuDNN's fused kernels
PAGE_TOKENS, PAGE_TOKENS_MIN = 128, 64  # of a paged cache; fastest as measured


def fits_cudnn(q: jax.Array, k: jax.Array) -> bool:
    """Whether `attend_cudnn` supports these: on a GPU, in bfloat16, heads of up to 128 channels.

    Lowering for a GPU that this machine lacks cannot use it: JAX queries the library.
    """
    channels = q.shape[-1]
    fits = channels <= CHANNELS_MAX and channels % CHANNELS_MULTIPLE == 0
    return jax.default_backend() == "gpu" and q.dtype == k.dtype == jnp.bfloat16 and fits


def attend_cudnn(
    q: BFloat16[Array, "T Hq C"],
    k: BFloat16[Array, "B Hkv P C"],
    v: BFloat16[Array, "B Hkv P C"],
    positions: Int32[Array, "T"],
    batch_rows: Int32[Array, "T"] | None = None,
    *,
    scale: float | None = None,
    window: int = 0,
    sinks: Float[Array, "Hq"] | None = None,
) -> BFloat16[Array, "T Hq C"]:
    """Same result as `attention.attend_xla`.

    Query heads that share a key head become the queries of one sequence for cuDNN, so that a cache
    is read once for all of them, without a transpose. With
    `batch_rows`, its pages are found through a table, and nothing is gathered.

    cuDNN has windows over whole sequences, not for a query at one position: the last `window`
    positions are copied out and attended to without one.

    On an H100, 64 tokens of two prompts with 1,000 positions before them took 39 us; 204 us with
    caches gathered, and 266 us by XLA. A window of 128 with sinks took 29 us, by XLA 304 us.
    """
    if 0 < window < k.shape[2]:
        own = jnp.arange(len(q)) if batch_rows is None else batch_rows
        first = jnp.maximum(positions + 1 - window, 0)
        k, v, batch_rows = _part(k, own, first, window), _part(v, own, first, window), None
        positions = jnp.minimum(positions, window - 1)
    page = math.gcd(k.shape[2], PAGE_TOKENS)
    if batch_rows is not None and (page < PAGE_TOKENS_MIN or len(k) % len(q)):
        k, v, batch_rows = k[batch_rows], v[batch_rows], None
    kv_heads, length, channels = k.shape[1:]
    lengths = jnp.repeat((positions + 1).astype(jnp.int32), kv_heads)
    if batch_rows is None:
        alone = lambda cache: cache.reshape(-1, length, 1, channels)
        return _attend(q, alone(k), alone(v), lengths, None, scale, sinks)
    table = page_table(batch_rows, k.shape[:3], page)
    paged = lambda cache: cache.reshape(-1, page, 1, channels)
    return _attend(q, paged(k), paged(v), lengths, table, scale, sinks)


def page_table(
    batch_rows: Int32[Array, "T"], shape: tuple[int, int, int], page: int
) -> Int32[Array, "N 1 _ 1"]:
    """Pages of N tokens times key heads, for contiguous caches of `shape` (B, Hkv, P).

    B must be a multiple of T, because JAX requires as many entries as pages; those beyond a
    cache's last page are not read. Batch rows [1 0], shape (2, 1, 256) and pages of 128 give
    `[2 3] [0 1]`.
    """
    sequences, kv_heads, length = shape
    caches = (batch_rows[:, None] * kv_heads + jnp.arange(kv_heads)).reshape(-1, 1)
    pages = length // page
    table = caches * pages + jnp.arange(pages)
    table = jnp.tile(table, (1, sequences // len(batch_rows)))
    return table[:, None, :, None].astype(jnp.int32)


def _part(cache, batch_rows, first, count: int):
    """`count` positions of each token's cache from its `first` one on: [T H count C]."""
    size = (1, cache.shape[1], count, cache.shape[3])
    take = lambda batch_row, start: lax.dynamic_slice(cache, (batch_row, 0, start, 0), size)[0]
    return jax.vmap(take)(batch_rows, first)


def _attend(
    q: BFloat16[Array, "T Hq C"],
    keys: BFloat16[Array, "_ P 1 C"],
    values: BFloat16[Array, "_ P 1 C"],
    lengths: Int32[Array, "N"],
    table: Int32[Array, "N 1 _ 1"] | None,
    scale: float | None,
    sinks: Float[Array, "Hq"] | None,
) -> BFloat16[Array, "T Hq C"]:
    """Attention of N = T * Hkv sequences, whose queries are the query heads of one key head.

    With sinks the softmax has one term more: `out * sigmoid(log of the sum of the others - sink)`.
    """
    tokens, query_heads, channels = q.shape
    queries = q.reshape(len(lengths), -1, 1, channels)
    each = jnp.full(len(lengths), queries.shape[1], jnp.int32)
    arguments = [queries, keys, values]
    options = {
        "scale": scale or channels**-0.5,
        "mask_type": fused.MaskType.PADDING,
        "return_residual": sinks is not None,
    }
    if table is None:
        found = fused.dot_product_attention(*arguments, q_seqlen=each, kv_seqlen=lengths, **options)
    else:
        found = fused.paged_attention(*arguments, each, lengths, table, table, **options)
    if sinks is None:
        return found.reshape(q.shape)
    context, logarithm = found
    share = jax.nn.sigmoid(logarithm.reshape(tokens, query_heads) - sinks.astype(jnp.float32))
    return (context.reshape(q.shape).astype(jnp.float32) * share[..., None]).astype(q.dtype)
