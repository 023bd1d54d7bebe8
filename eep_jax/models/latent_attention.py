"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), in its absorbed form.

A head's key is `key_up[h] @ latent` beside one rotated key of all heads, its value is
`latent @ value_up[h]`. Instead of keys and values of every position, `key_up` is applied once to
the query and `value_up` to the weighted latent, with the same products.

XLA computes it on GPUs as well, a block of positions at a time.
`benchmarks.bench_attention --cases=latents` compares it with its bound; no GPU has run it yet.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from eep_jax.config import ModelConfig
from eep_jax.models.attention import each_sequence
from eep_jax.models.linear import linear
from eep_jax.models.paged_attention import attend_latent_pages, seen
from eep_jax.models.rope import rope

NORM_EPS = 1e-6  # of the latents' norms, independent of the layers'


class LatentAttention(nnx.Module):
    """One latent attention layer, with the methods of Attention.

    Its k is the rotated key `[*T 1 Cr]`, its v the latent `[*T 1 Ckv]`.
    """

    def __init__(self, config: ModelConfig, layer: int = 0, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config, latent, heads = config, config.latent, config.query_heads
        options = {"param_dtype": dtype, "rngs": rngs}
        project = lambda i, o: linear(i, o, use_bias=False, **options)
        norm = lambda width: nnx.RMSNorm(width, epsilon=NORM_EPS, **options)
        query = heads * (latent.plain_channels + latent.rope_channels)
        if latent.q_rank:
            self.q_down, self.q_norm = project(config.hidden, latent.q_rank), norm(latent.q_rank)
            self.q_up = project(latent.q_rank, query)
        else:
            self.q_proj = project(config.hidden, query)
        self.kv_down = project(config.hidden, latent.kv_rank + latent.rope_channels)
        self.kv_norm = norm(latent.kv_rank)
        draw = lambda *shape: (
            jax.random.normal(rngs.params(), shape, jnp.float32) * latent.kv_rank**-0.5
        ).astype(dtype)
        self.key_up = nnx.Param(draw(heads, latent.plain_channels, latent.kv_rank))
        self.value_up = nnx.Param(draw(heads, latent.kv_rank, latent.value_channels))
        self.o_proj = project(heads * latent.value_channels, config.hidden)

    def project(
        self, x: Float[Array, "*T D"], positions: Int32[Array, "*T"]
    ) -> tuple[Float[Array, "*T Hq Q"], Float[Array, "*T 1 Cr"], Float[Array, "*T 1 Ckv"]]:
        """Returns q (absorbed, then rotated channels: Q = Ckv + Cr), k and v."""
        config, latent = self.config, self.config.latent
        q = self.q_up(self.q_norm(self.q_down(x))) if latent.q_rank else self.q_proj(x)
        q = q.reshape(*q.shape[:-1], config.query_heads, -1)
        turn = lambda y: rope(y, positions, config.rope_theta, config.rope)
        plain, turned = q[..., : latent.plain_channels], turn(q[..., latent.plain_channels :])
        absorbed = by_head(plain, self.key_up[...])
        kept = self.kv_down(x)
        key = turn(kept[..., None, latent.kv_rank :])
        return (
            jnp.concatenate([absorbed, turned], axis=-1),
            key,
            self.kv_norm(kept[..., : latent.kv_rank])[..., None, :],
        )

    def attend(
        self,
        q: Float[Array, "T Hq Q"],
        keys: Float[Array, "N 1 G Cr"],
        values: Float[Array, "N 1 G Ckv"],
        table: Int32[Array, "B J"],
        batch_rows: Int32[Array, "T"],
        positions: Int32[Array, "T"],
    ) -> Float[Array, "T Hq Ckv"]:
        """`attend_latent_pages` with the scale of this model."""
        return attend_latent_pages(
            q, keys, values, table[batch_rows], positions, scale=self._scale()
        )

    def attend_whole(
        self,
        q: Float[Array, "N T Hq Q"],
        k: Float[Array, "N T 1 Cr"],
        v: Float[Array, "N T 1 Ckv"],
    ) -> Float[Array, "N T Hq Ckv"]:
        """Causal attention of N whole sequences."""

        def one(
            q: Float[Array, "T Hq Q"],
            keys: Float[Array, "T 1 P Cr"],
            latents: Float[Array, "T 1 P Ckv"],
            positions: Int32[Array, "T"],
        ) -> Float[Array, "T Hq Ckv"]:
            return attend_latent(q, keys[:, 0], latents[:, 0], positions, scale=self._scale())

        return each_sequence(one, q, k, v)

    def _scale(self) -> float:
        latent = self.config.latent
        width = latent.plain_channels + latent.rope_channels
        return width**-0.5 * self.config.rope.score_factor

    def output(self, context: Float[Array, "*T Hq Ckv"]) -> Float[Array, "*T D"]:
        values = by_head(context, self.value_up[...])
        return self.o_proj(values.reshape(*values.shape[:-2], -1))


def by_head(x: Float[Array, "*T Hq C"], weights: Float[Array, "Hq C N"]) -> Float[Array, "*T Hq N"]:
    """Multiplies each head by its own matrix; accumulated in float32, returned in x's dtype.

    Heads are the leading axis: XLA:CPU of JAX 0.12 has no other batched bfloat16 product.
    """
    first = jnp.moveaxis(x, -2, 0)
    product = jnp.einsum("h...c,hcn->h...n", first, weights, preferred_element_type=jnp.float32)
    return jnp.moveaxis(product, 0, -2).astype(x.dtype)


def attend_latent(
    q: Float[Array, "T Hq Q"],
    keys: Float[Array, "T P Cr"],
    latents: Float[Array, "T P Ckv"],
    positions: Int32[Array, "T"],
    *,
    scale: float,
) -> Float[Array, "T Hq Ckv"]:
    """Attention of T tokens, each to its own P cached latents up to `positions[t]`.

    Q is Ckv + Cr. As in `attend_xla` each token is a separate batch entry, scores and softmax are
    float32, and the result has q's dtype.
    """
    rank = latents.shape[-1]
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = product("thr,tpr->thp", q[..., :rank], latents)
    scores = (scores + product("thr,tpr->thp", q[..., rank:], keys)) * scale
    visible = seen(jnp.arange(keys.shape[1]), positions)
    scores = jnp.where(visible[:, None, :], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(latents.dtype)
    # What an earlier sequence left there may be NaN, and 0 x NaN is NaN.
    latents = jnp.where(visible[:, :, None], latents, 0)
    return product("thp,tpr->thr", weights, latents).astype(q.dtype)
