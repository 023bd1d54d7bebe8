"""Received choices grouped by expert slot, in tiles: the lists that an expert GEMM runs over."""

import typing

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

SMALL_ROWS = 40  # up to this many rows per slot, most slots need one tile of 64 only


class ExpertRows(typing.NamedTuple):
    """Choices (indices into `[R T K]`, flattened) grouped by slot, and the tiles that hold them.

    The choices of slot s are `grouped[s * rows_max : s * rows_max + counts[s]]`, in any order. Tile
    i holds up to `tile_rows` of them, from position `tile_firsts[i]` of slot `tile_slots[i]`; only
    the first `num_tiles[0]` tiles exist. In tiles of 64 rows, 70, 0 and 3 choices for three slots
    make num_tiles `[3]`, tile_slots `[0 0 2 ...]` and tile_firsts `[0 64 0 ...]`.
    """

    grouped: Int32[Array, "_"]
    counts: Int32[Array, "S"]
    num_tiles: Int32[Array, "1"]
    tile_slots: Int32[Array, "N"]
    tile_firsts: Int32[Array, "N"]

    @property
    def rows_max(self) -> int:
        """Room of one slot in `grouped`."""
        return self.grouped.shape[0] // self.counts.shape[0]

    @property
    def tiles_max(self) -> int:
        return self.tile_slots.shape[0]


def tile_rows_for(rows_per_slot: float) -> int:
    """Rows of a tile if a slot gets so many: 64, or 128 once 64 are rarely enough."""
    return 64 if rows_per_slot <= SMALL_ROWS else 128


def tiles_max(choices: int, num_slots: int, tile_rows: int) -> int:
    """Most tiles that so many choices can need: 130 choices on 8 slots in tiles of 64 need 10."""
    return choices // tile_rows + min(num_slots, choices)


def group_rows(
    slots: Int32[Array | np.ndarray, "R T K"], num_slots: int, tile_rows: int, rows_max: int = 0
) -> ExpertRows:
    """Groups choices by their slot on this rank; -1 marks a choice that runs elsewhere.

    `rows_max` is the room of a slot; by default R T, enough if a token has a slot at most once.
    """
    ranks, tokens, _ = slots.shape
    flat, pairs, rows_max = slots.reshape(-1), slots.size, rows_max or ranks * tokens
    one_hot = (flat[:, None] == jnp.arange(num_slots)).astype(jnp.int32)
    place = jnp.sum((jnp.cumsum(one_hot, axis=0) - 1) * one_hot, axis=1)
    counts = jnp.sum(one_hot, axis=0)
    at = jnp.where(flat >= 0, flat * rows_max + place, num_slots * rows_max)
    grouped = jnp.zeros(num_slots * rows_max, jnp.int32).at[at].set(jnp.arange(pairs), mode="drop")
    ends = jnp.cumsum(-(-counts // tile_rows))
    tile = jnp.arange(tiles_max(pairs, num_slots, tile_rows))
    slot = jnp.minimum(jnp.searchsorted(ends, tile, side="right"), num_slots - 1)
    first = (tile - jnp.where(slot > 0, ends[slot - 1], 0)) * tile_rows
    return ExpertRows(grouped, counts, *(a.astype(jnp.int32) for a in (ends[-1:], slot, first)))
