"""Dispatch on a GPU: rows straight into peers' windows, read by the experts where they arrive."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, UInt8

from pallas_kernels import peers
from pallas_kernels.call import Call
from pallas_kernels.dispatch.config import DispatchConfig
from pallas_kernels.fp8 import pack_rows, unpack_rows
from pallas_kernels.gpu import (
    GROUP_THREADS,
    MemberLists,
    Place,
    arrive,
    entry,
    open_heap,
    partner_test,
    partners_of,
    read_region,
    simt,
    words_of,
)
from pallas_kernels.peers import Word


@jax.tree_util.register_dataclass
@typing.no_type_check  # leaves may be abstract under tree.map
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsInWindow:
    """Rows that dispatch received, left where they arrived, and which of them belong to which slot.

    Valid until the next use of the window's half. The lists are those of `gpu.MemberLists`.
    """

    heap: UInt8[Array, "N B"]
    call: Call  # of this use of the window
    rank: Int32[Array, ""]
    members: Int32[Array, "_"]
    counts: Int32[Array, "S"]
    tiles: Int32[Array, "_"]
    slots: Int32[Array, "R T K"]
    lists: MemberLists = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int, int]:
        """That of the rows: `(R, T, D)`."""
        return (*self.slots.shape[:2], self.lists.place.layout.hidden)

    def array(self) -> Float[Array, "R T D"]:
        """A copy; rows without a slot here are zero. For fp8, widened to the layout's row dtype."""
        layout, (_, tokens, _) = self.lists.place.layout, self.shape
        place, after = self.lists.place, self.tiles
        rows = read_region("rows", place, self.heap, self.call, self.rank, after)[:, :tokens]
        if layout.dispatch_dtype:
            rows = unpack_rows(rows, layout.hidden, jnp.dtype(layout.row_dtype))
        return jnp.where((self.slots >= 0).any(-1)[..., None], rows, 0)

    def weights(self) -> Float32[Array, "R T K"]:
        """The weights the sources sent; zero of choices that lie elsewhere."""
        place, after = self.lists.place, self.tiles
        found = read_region("weights", place, self.heap, self.call, self.rank, after)
        return jnp.where(self.slots >= 0, found[:, : self.shape[1]], 0)


def dispatch_mosaic(
    x: Float[Array, "T D"],
    slots: Int32[Array, "T K"],
    weights: Float32[Array, "T K"],
    heap: UInt8[Array, "N B"],
    call: Call,
    rank,
    place: Place,
    config: DispatchConfig,
):
    """As `dispatch.api.dispatch`, but the rows are a RowsInWindow."""
    sent = send(x, slots, weights, heap, call, rank, place, config)
    return receive(slots.shape, heap, call, rank, sent, place, config)


def receive(
    shape: tuple[int, int], heap, call: Call, rank, sent, place: Place, config: DispatchConfig
):
    """Posts, waits, and lists what came by slot. `sent` is the output of `send`, shape (T, K)."""
    lists = MemberLists(place, *shape, config.tile_rows)
    found = arrive("sent", place, heap, call, rank, sent, members=lists)
    received = found["slots"].reshape(place.ranks, *shape)
    rows = RowsInWindow(
        heap=heap,
        call=call,
        rank=jnp.asarray(rank, jnp.int32),
        members=found["members"],
        counts=found["counts"],
        tiles=found["tiles"],
        slots=received,
        lists=lists,
    )
    wish = found["wish"][0].astype(jnp.uint32)
    return rows, received, rows.weights(), found["suspicion"], wish


def targets_of(
    slots: Int32[Array, "T K"], partners: Int32[Array, "R"], slots_per_rank: int
) -> Int32[Array, "T K"]:
    """The rank that choice k makes a row travel to, -1 where none does.

    A row travels once per rank, for the first of its choices that lies there: slots `[3 19 5]` with
    S=8 travel to `[0 2 -1]`.
    """
    owner = jnp.where(slots >= 0, slots // slots_per_rank, -1)
    earlier = jnp.tril(jnp.ones((slots.shape[1],) * 2, bool), -1)
    repeated = (owner[:, :, None] == owner[:, None, :]) & earlier
    wanted = (owner >= 0) & ~repeated.any(-1) & (partners[jnp.maximum(owner, 0)] > 0)
    return jnp.where(wanted, owner, -1)


def send(x, slots, weights, heap, call: Call, rank, place: Place, config: DispatchConfig):
    """Writes rows, slots and weights into the partners' windows; the flags are `arrive`'s.

    Returns an array that is there once all is written.
    """
    layout, (tokens, choices) = place.layout, slots.shape
    rows = pack_rows(x) if layout.dispatch_dtype else x.astype(layout.row_dtype)
    targets = targets_of(slots, partners_of(call, rank), place.slots_per_rank)
    blocks = max(place.ranks, min(tokens, config.blocks))
    entries = tokens * choices

    def body(rows, targets, slots, weights, active, suspicion, scalars, heap_ref, done):
        heap, thread, block = open_heap(place, heap_ref, scalars), peers.thread(), peers.block()
        is_partner, _ = partner_test(active, suspicion, heap.rank)

        def send_token(token: Word) -> None:
            ranks = [peers.load(entry(targets, token * choices + k)) for k in range(choices)]
            to = [(heap.region("rows", r, heap.rank, token), r >= 0) for r in ranks]
            offset = token.wide() * layout.row_bytes
            peers.copy_row(peers.address(rows, offset), to, layout.row_bytes)

        def send_metadata(peer: Word) -> None:
            def four(index: Word) -> None:
                offset = index.wide() * 16
                found = peers.load_words(peers.address(slots, offset), 4)
                here = [(s >= 0) & (s // place.slots_per_rank == peer) for s in found]
                local = [
                    peers.select(h, s % place.slots_per_rank, peers.word(-1))
                    for h, s in zip(here, found, strict=True)
                ]
                peers.store_words(heap.region("slots", peer, heap.rank) + offset, local)
                shares = peers.load_wide(peers.address(weights, offset))
                peers.store_wide(heap.region("weights", peer, heap.rank) + offset, shares)

            with peers.when(is_partner(peer)):
                peers.each(thread, entries // 4, GROUP_THREADS, four)

        peers.each(block, tokens, blocks, send_token)
        # The last blocks have the fewest tokens.
        peers.each(peers.word(blocks - 1) - block, place.ranks, blocks, send_metadata)
        with peers.when((block == 0) & (thread == 0)):
            peers.store(peers.address(done), peers.word(1))

    operands = (
        rows,
        targets,
        slots.reshape(-1),
        weights.reshape(-1),
        call.active,
        call.suspicion,
        words_of(call, rank),
    )
    done = {"done": ((1,), jnp.int32)}
    return simt(body, *operands, heap, out=done, grid=blocks, name="dispatch_send")["done"]
