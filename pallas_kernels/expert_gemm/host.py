"""Grouped GEMM + activation for CPU: choices grouped by slot into tiles of a few rows each.

The loop runs over the tiles that exist, not over the most there could be. Every product has the
same shape, `[tile D] x [D F]`, so a row's result has the same bits in any tile, at any position.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.expert_gemm.mlp import SWIGLU, ExpertMlp
from pallas_kernels.grouping import group_rows


def expert_gemm_tiles(
    rows: Float[Array, "R T D"],
    slots: Int32[Array, "R T K"],
    bank: Float[Array, "S L 3 F D"],
    layer: int | Int32[Array, ""],
    tile_rows: int,
    mlp: ExpertMlp = SWIGLU,
) -> Float[Array, "R T K D"]:
    """Same as the reference for `bank[:, layer]`; rows of choices that run elsewhere are zero."""
    sources, tokens, choices = slots.shape
    hidden, num_slots = rows.shape[-1], bank.shape[0]
    pairs = sources * tokens * choices
    flat_rows = rows.reshape(-1, hidden)

    lists = group_rows(slots, num_slots, tile_rows, rows_max=pairs)

    def one_tile(tile, out):
        slot, place = lists.tile_slots[tile], lists.tile_firsts[tile] + jnp.arange(tile_rows)
        chosen = lists.grouped[slot * lists.rows_max + place]
        chosen = jnp.where(place < lists.counts[slot], chosen, pairs)
        x = flat_rows[jnp.minimum(chosen, pairs - 1) // choices]
        at = (slot, layer, 0, 0, 0)
        expert = lax.dynamic_slice(bank, at, (1, 1, *bank.shape[2:]))
        weights, biases = mlp.split(expert[0, 0])
        by_channel = (((1,), (1,)), ((), ()))
        gate = lax.dot_general(x, weights[0], by_channel)
        up = lax.dot_general(x, weights[1], by_channel)
        if biases is not None:
            gate, up = gate + biases[0], up + biases[1]
        y = jnp.dot(mlp.activate(gate, up), weights[2])
        if biases is not None:
            y = y + biases[2]
        return out.at[chosen].set(y, mode="drop", unique_indices=True)

    out = lax.fori_loop(0, lists.num_tiles[0], one_tile, jnp.zeros((pairs, hidden), rows.dtype))
    return out.reshape(sources, tokens, choices, hidden)
