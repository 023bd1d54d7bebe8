"""KV cache: keys and values of all sequences of a rank, written by position."""

import dataclasses
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from eep_jax.config import EngineConfig, ModelConfig


@jax.tree_util.register_dataclass
@typing.no_type_check  # leaves may be abstract under tree.map
@dataclasses.dataclass(frozen=True)
class KVCache:
    """One array per layer. Latent attention stores its rotated key and its latent, one head each.

    Writes are idempotent: a discarded step that runs again writes the same rows.
    """

    keys: tuple[Float[Array, "B Hk P Ck"], ...]
    values: tuple[Float[Array, "B Hv P Cv"], ...]

    def write(
        self,
        layer: int,
        batch_rows: Int32[Array, "T"],
        positions: Int32[Array, "T"],
        k: Float[Array, "T Hk Ck"],
        v: Float[Array, "T Hv Cv"],
    ) -> "KVCache":
        """Writes token t at `[batch_rows[t], :, positions[t]]`; a position of -1 writes nothing."""
        # Negative indices count from the end; out-of-range ones are dropped.
        length = self.keys[layer].shape[2]
        at = (batch_rows, slice(None), jnp.where(positions < 0, length, positions))
        put = lambda old, new: old.at[at].set(new, mode="drop")
        keys = (*self.keys[:layer], put(self.keys[layer], k), *self.keys[layer + 1 :])
        values = (*self.values[:layer], put(self.values[layer], v), *self.values[layer + 1 :])
        return KVCache(keys, values)


def empty_cache(model: ModelConfig, engine: EngineConfig) -> KVCache:
    """Zeros for B sequences of P positions, in the engine's dtype, without a compilation.

    Zeros are uploaded to the device: a program of `zeros_of_cache` avoids that.
    """
    # A copy, since the cache is donated.
    put = lambda zeros: jax.device_put(zeros, may_alias=False)
    return _cache(model, lambda heads, channels: put(np.zeros(*_shape(engine, heads, channels))))


def zeros_of_cache(model: ModelConfig, engine: EngineConfig) -> KVCache:
    """Traceable `empty_cache`."""
    return _cache(model, lambda heads, channels: jnp.zeros(*_shape(engine, heads, channels)))


def _shape(engine: EngineConfig, heads: int, channels: int) -> tuple[tuple[int, ...], str]:
    return (engine.batch_rows, heads, engine.context_tokens, channels), engine.dtype


def _cache(model: ModelConfig, make: Callable[[int, int], jax.Array]) -> KVCache:
    keys, values = model.cache_channels
    of_layers = lambda sizes: tuple(make(*sizes) for _ in range(model.layers))
    return KVCache(of_layers(keys), of_layers(values))
