"""Grouped GEMM + activation for CPU: choices grouped by slot into tiles of a few rows each.

The loop runs over the tiles that hold rows, not over the most there could be. Every product has the
same shape, `[tile D] x [D F]`, so a row's result has the same bits in any tile, at any place.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.expert_gemm.mlp import SWIGLU, ExpertMlp


def expert_gemm_tiles(
    rows: Float[Array, "R T D"],
    slots: Int32[Array, "R T K"],
    bank: Float[Array, "S L 3 F D"],
    layer: int,
    tile_rows: int,
    mlp: ExpertMlp = SWIGLU,
) -> Float[Array, "R T K D"]:
    """Same as the reference for `bank[:, layer]`; rows of choices that lie elsewhere are zero."""
    sources, tokens, choices = slots.shape
    hidden, num_slots = rows.shape[-1], bank.shape[0]
    pairs = sources * tokens * choices
    flat_rows, flat_slots = rows.reshape(-1, hidden), slots.reshape(-1)

    # Group: where each choice stands, slot by slot, each slot's first row at the start of a tile.
    one_hot = (flat_slots[:, None] == jnp.arange(num_slots)).astype(jnp.int32)
    place = jnp.sum((jnp.cumsum(one_hot, axis=0) - 1) * one_hot, axis=1)
    tiles = -(-jnp.sum(one_hot, axis=0) // tile_rows)
    ends = jnp.cumsum(tiles)
    tiles_max = pairs // tile_rows + min(num_slots, pairs)
    start = (ends - tiles)[jnp.maximum(flat_slots, 0)] * tile_rows
    position = jnp.where(flat_slots >= 0, start + place, tiles_max * tile_rows)
    pair_at = (
        jnp.full(tiles_max * tile_rows, pairs)
        .at[position]
        .set(jnp.arange(pairs), mode="drop", unique_indices=True)
    )
    slot_of_tile = jnp.searchsorted(ends, jnp.arange(tiles_max), side="right")

    def one_tile(tile, out):
        chosen = lax.dynamic_slice(pair_at, (tile * tile_rows,), (tile_rows,))
        x = flat_rows[jnp.minimum(chosen, pairs - 1) // choices]
        expert = lax.dynamic_index_in_dim(bank, slot_of_tile[tile], keepdims=False)[layer]
        weights, biases = mlp.split(expert)
        by_channel = (((1,), (1,)), ((), ()))
        gate = lax.dot_general(x, weights[0], by_channel)
        up = lax.dot_general(x, weights[1], by_channel)
        if biases is not None:
            gate, up = gate + biases[0], up + biases[1]
        y = jnp.dot(mlp.activate(gate, up), weights[2])
        if biases is not None:
            y = y + biases[2]
        return out.at[chosen].set(y, mode="drop", unique_indices=True)

    out = lax.fori_loop(0, ends[-1], one_tile, jnp.zeros((pairs, hidden), rows.dtype))
    return out.reshape(sources, tokens, choices, hidden)
