"""Attention to pages in plain JAX, the specification: each query alone, all keys at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def attention_reference(
    q: Float[Array, "T Hq C"],
    keys: Float[Array, "N Hkv G C"],
    values: Float[Array, "N Hkv G C"],
    table: Int32[Array, "B J"],
    sequences: Int32[Array, "T"],
    positions: Int32[Array, "T"],
    *,
    scale: float,
    window: int = 0,
    sinks: Float[Array, "Hq"] | None = None,
) -> Float[Array, "T Hq C"]:
    """`softmax(scale * q . keys) @ values` over positions `<= positions[t]`, float32 inside.

    Page `table[sequences[t], j]` holds positions `j * G ... (j + 1) * G - 1` of token t's sequence.
    With a window only the last so many positions are seen; a sink adds `exp(sink)` to the
    denominator. Values of positions that are not seen may be anything, NaN too.
    """

    def one(query, sequence, position):
        flat = lambda pages: jnp.moveaxis(pages[table[sequence]], 1, 0).reshape(
            pages.shape[1], -1, pages.shape[-1]
        )
        k, v = flat(keys).astype(jnp.float32), flat(values).astype(jnp.float32)
        places = jnp.arange(k.shape[1])
        seen = (places <= position) & ((places > position - window) | (window == 0))
        grouped = query.astype(jnp.float32).reshape(k.shape[0], -1, query.shape[-1])
        scores = jnp.einsum("hgc,hpc->hgp", grouped, k) * scale
        scores = jnp.where(seen, scores, -jnp.inf)
        top = jnp.max(scores, axis=-1, keepdims=True)
        if sinks is not None:
            sink = sinks.astype(jnp.float32).reshape(k.shape[0], -1, 1)
            top = jnp.maximum(top, sink)
        shares = jnp.exp(scores - top)
        total = jnp.sum(shares, axis=-1, keepdims=True)
        if sinks is not None:
            total = total + jnp.exp(sink - top)
        v = jnp.where(seen[:, None], v, 0)
        return (jnp.einsum("hgp,hpc->hgc", shares, v) / total).reshape(query.shape)

    alone = lambda parts: one(*parts)
    return jax.lax.map(alone, (q, sequences, positions)).astype(q.dtype)
