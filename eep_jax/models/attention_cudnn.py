"""Attention to a cache by cuDNN: it reads each sequence as far as it goes, not the whole cache."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Int32

CHANNELS_MAX, CHANNELS_MULTIPLE = 128, 8  # of a head, for cuDNN's fused kernels


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
) -> BFloat16[Array, "T Hq C"]:
    """As `attention.attend_cached`, which says what is computed.

    The query heads that share a key head see the same keys, so they are given to cuDNN as the
    queries of one sequence: a cache is read once for all of them, and is not transposed.
    """
    tokens, query_heads, channels = q.shape
    kv_heads, length = k.shape[1:3]
    queries = q.reshape(tokens * kv_heads, query_heads // kv_heads, 1, channels)
    alone = lambda cache: cache.reshape(tokens * kv_heads, length, 1, channels)
    context = jax.nn.dot_product_attention(
        queries,
        alone(k),
        alone(v),
        key_value_seq_lengths=jnp.repeat(positions + 1, kv_heads),
        implementation="cudnn",
    )
    return context.reshape(tokens, query_heads, channels)
