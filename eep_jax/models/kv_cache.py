"""KV cache: keys and values of all sequences of a rank, in pages."""

import dataclasses
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from eep_jax.config import ModelConfig, RunConfig


@jax.tree_util.register_dataclass
@typing.no_type_check  # leaves may be abstract under tree.map
@dataclasses.dataclass(frozen=True)
class KVCache:
    """One array of N pages per layer; a page holds G consecutive positions of one sequence.

    A page table `[B J]` has the pages of each sequence: page `table[b, j]` holds its positions
    `j * G ... (j + 1) * G - 1`, in all layers. Latent attention stores its rotated key and its
    latent, one head each.

    Writes are idempotent: a discarded step that runs again writes the same rows.
    """

    keys: tuple[Float[Array, "N Hk G Ck"], ...]
    values: tuple[Float[Array, "N Hv G Cv"], ...]

    def write(
        self,
        layer: int,
        places: tuple[Int32[Array, "T"], Int32[Array, "T"]],
        k: Float[Array, "T Hk Ck"],
        v: Float[Array, "T Hv Cv"],
    ) -> "KVCache":
        """Writes token t at its place, a page and an offset in it: see `places_of`."""
        page, offset = places
        put = lambda old, new: old.at[page, :, offset].set(new, mode="drop")
        keys = (*self.keys[:layer], put(self.keys[layer], k), *self.keys[layer + 1 :])
        values = (*self.values[:layer], put(self.values[layer], v), *self.values[layer + 1 :])
        return KVCache(keys, values)

    def places_of(
        self,
        table: Int32[Array, "B J"],
        batch_rows: Int32[Array, "T"],
        positions: Int32[Array, "T"],
    ) -> tuple[Int32[Array, "T"], Int32[Array, "T"]]:
        """Page and offset of each token; for a position of -1 a page that no write reaches."""
        pages, _, size, _ = self.keys[0].shape
        page = table[batch_rows, jnp.maximum(positions, 0) // size]
        # Negative indices count from the end; out-of-range ones are dropped.
        return jnp.where(positions < 0, pages, page), positions % size


def empty_cache(config: RunConfig) -> KVCache:
    """Zeros for `config.kv_pages` pages, in the engine's dtype, without a compilation.

    Zeros are uploaded to the device: a program of `zeros_of_cache` avoids that.
    """
    put = lambda zeros: jax.device_put(zeros, may_alias=False)
    return _cache(
        config.model, lambda heads, channels: put(np.zeros(*_shape(config, heads, channels)))
    )


def zeros_of_cache(config: RunConfig) -> KVCache:
    """Traceable `empty_cache`."""
    return _cache(config.model, lambda heads, channels: jnp.zeros(*_shape(config, heads, channels)))


def _shape(config: RunConfig, heads: int, channels: int) -> tuple[tuple[int, ...], str]:
    return (config.kv_pages, heads, config.engine.page_tokens, channels), config.engine.dtype


def _cache(model: ModelConfig, make: Callable[[int, int], jax.Array]) -> KVCache:
    keys, values = model.cache_channels
    of_layers = lambda sizes: tuple(make(*sizes) for _ in range(model.layers))
    return KVCache(of_layers(keys), of_layers(values))
