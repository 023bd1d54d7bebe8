"""Attention to a cache by cuDNN: it reads each sequence as far as it goes, not the whole cache."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Int32

CHANNELS_MAX, CHANNELS_MULTIPLE = 128, 8  # of a head, for cuDNN's fused kernels
PAGE_TOKENS = 128  # of a cache that is looked up by a table


def fits_cudnn(q: jax.Array, k: jax.Array) -> bool:
    """Whether `attend_cudnn` takes these: on a GPU, in bfloat16, heads of up to 128 channels.

    A program that is lowered for a GPU that is not here cannot use it: JAX asks the library.
    """
    channels = q.shape[-1]
    fits = channels <= CHANNELS_MAX and channels % CHANNELS_MULTIPLE == 0
    return jax.default_backend() == "gpu" and q.dtype == k.dtype == jnp.bfloat16 and fits


def attend_cudnn(
    q: BFloat16[Array, "T Hq C"],
    k: BFloat16[Array, "T Hkv P C"],
    v: BFloat16[Array, "T Hkv P C"],
    positions: Int32[Array, "T"],
    *,
    scale: float | None = None,
    sinks: Float[Array, "Hq"] | None = None,
) -> BFloat16[Array, "T Hq C"]:
    """As `attention.attend_cached`, which says what is computed.

    The query heads that share a key head see the same keys, so they are given to cuDNN as the
    queries of one sequence: a cache is read once for all of them, and is not transposed.
    """
    tokens, _, channels = q.shape
    kv_heads, length = k.shape[1:3]
    alone = lambda cache: cache.reshape(tokens * kv_heads, length, 1, channels)
    return _packed(q, alone(k), alone(v), jnp.repeat(positions + 1, kv_heads), scale, sinks)


def attend_window(
    q: BFloat16[Array, "T Hq C"],
    k: BFloat16[Array, "B Hkv P C"],
    v: BFloat16[Array, "B Hkv P C"],
    slots: Int32[Array, "T"],
    positions: Int32[Array, "T"],
    window: int,
    *,
    scale: float | None = None,
    sinks: Float[Array, "Hq"] | None = None,
) -> BFloat16[Array, "T Hq C"]:
    """Token t sees the last `window` positions of sequence `slots[t]`: they are copied out first.

    cuDNN has windows of whole sequences alone, not of a query that stands for one position.
    """
    window = min(window, k.shape[2])
    first = jnp.maximum(positions + 1 - window, 0)
    part = lambda cache, slot, start: lax.dynamic_slice(
        cache, (slot, 0, start, 0), (1, cache.shape[1], window, cache.shape[3])
    )[0]
    seen = lambda cache: jax.vmap(part, in_axes=(None, 0, 0))(cache, slots, first)
    last = jnp.minimum(positions, window - 1)
    return attend_cudnn(q, seen(k), seen(v), last, scale=scale, sinks=sinks)


def attend_paged(
    q: BFloat16[Array, "T Hq C"],
    k: BFloat16[Array, "B Hkv P C"],
    v: BFloat16[Array, "B Hkv P C"],
    slots: Int32[Array, "T"],
    positions: Int32[Array, "T"],
    *,
    scale: float | None = None,
    sinks: Float[Array, "Hq"] | None = None,
    page_tokens: int = PAGE_TOKENS,
) -> BFloat16[Array, "T Hq C"]:
    """Token t sees sequence `slots[t]`, found through a table of pages: nothing is gathered.

    T must divide B: JAX wants as many entries in the table as there are pages.
    """
    tokens, _, channels = q.shape
    sequences, kv_heads, length, _ = k.shape
    pages = length // page_tokens
    caches = (jnp.maximum(slots, 0)[:, None] * kv_heads + jnp.arange(kv_heads)).reshape(-1)
    table = caches[:, None] * pages + jnp.arange(pages)
    # What is beyond a sequence's length is not looked up.
    table = jnp.tile(table, (1, sequences // tokens))[:, None, :, None].astype(jnp.int32)
    paged = lambda cache: cache.reshape(-1, page_tokens, 1, channels)
    lengths = jnp.repeat(positions + 1, kv_heads)
    return _packed(q, paged(k), paged(v), lengths, scale, sinks, table)


def _packed(q, keys, values, lengths, scale, sinks, table=None):
    """Attention of sequences `[T * Hkv]`, each with the query heads of one key head as queries.

    With a sink the softmax has one more term: `out * sigmoid(lse - sink)`, where cuDNN says what
    the logarithm of the sum of the others is.
    """
    # What jax.nn passes on has neither tables nor that logarithm in float32.
    from jax._src.cudnn import fused_attention_stablehlo as fused

    tokens, query_heads, channels = q.shape
    queries = q.reshape(len(lengths), -1, 1, channels)
    each = jnp.full(len(lengths), queries.shape[1], jnp.int32)
    lengths = lengths.astype(jnp.int32)
    options = {
        "scale": scale or channels**-0.5,
        "mask_type": fused.MaskType.PADDING,
        "return_residual": sinks is not None,
    }
    if table is None:
        found = fused.dot_product_attention(
            queries, keys, values, q_seqlen=each, kv_seqlen=lengths, **options
        )
    else:
        found = fused.paged_attention(queries, keys, values, each, lengths, table, table, **options)
    if sinks is None:
        return found.reshape(tokens, query_heads, channels)
    context, logsumexp = found
    share = jax.nn.sigmoid(logsumexp.reshape(tokens, query_heads) - sinks.astype(jnp.float32))
    context = context.reshape(tokens, query_heads, channels).astype(jnp.float32)
    return (context * share[..., None]).astype(q.dtype)
