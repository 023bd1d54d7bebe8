"""KV cache: keys and values of all sequences of a rank, in pages."""

import dataclasses
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from eep_jax.config import RunConfig


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
    tokens: Int32[Array, "N G"]  # that the keys and values are of

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
        return KVCache(keys, values, self.tokens)

    def write_tokens(
        self, places: tuple[Int32[Array, "T"], Int32[Array, "T"]], tokens: Int32[Array, "T"]
    ) -> "KVCache":
        """Records the tokens that `write` has the keys and values of."""
        page, offset = places
        written = self.tokens.at[page, offset].set(tokens, mode="drop")
        return KVCache(self.keys, self.values, written)

    def history(self, pages: Int32[Array, "S J"]) -> Int32[Array, "S P"]:
        """The token at each position of sequences with these pages; any number where none is."""
        return self.tokens[pages].reshape(len(pages), -1)

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
    return _cache(config, lambda *form: jax.device_put(np.zeros(*form), may_alias=False))


def zeros_of_cache(config: RunConfig) -> KVCache:
    """Traceable `empty_cache`."""
    return _cache(config, jnp.zeros)


def _cache(config: RunConfig, make: Callable[[tuple[int, ...], str], jax.Array]) -> KVCache:
    pages, size, dtype = config.kv_pages, config.engine.page_tokens, config.engine.dtype

    def of_layers(heads: int, channels: int) -> tuple[jax.Array, ...]:
        return tuple(
            make((pages, heads, size, channels), dtype) for _ in range(config.model.layers)
        )

    keys, values = config.model.cache_channels
    return KVCache(of_layers(*keys), of_layers(*values), make((pages, size), "int32"))
