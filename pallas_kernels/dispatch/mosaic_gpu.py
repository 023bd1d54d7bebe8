"""Dispatch on a GPU: rows straight into peers' windows, read by the experts where they arrive."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, UInt8

from pallas_kernels import peers
from pallas_kernels.call import Call
from pallas_kernels.dispatch.config import DispatchConfig
from pallas_kernels.dispatch.rows import pieces, send_narrowed
from pallas_kernels.fp8 import unpack_rows
from pallas_kernels.gpu import (
    DISPATCH_DONE,
    GROUP_THREADS,
    ArrivalFlags,
    ExchangeScalars,
    ExchangeSpec,
    Heap,
    RowLists,
    await_partners,
    entry,
    exchange_scalars,
    first_of_each,
    forget_home,
    gather_votes,
    is_last_block,
    open_heap,
    partner_test,
    read_region,
    simt,
    tell_partners,
)
from pallas_kernels.peers import Word


@jax.tree_util.register_dataclass
@typing.no_type_check  # leaves may be abstract under tree.map
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsInWindow:
    """Rows that dispatch received, left where they arrived, and which of them belong to which slot.

    Valid until the next use of the window's half. The lists are those of `gpu.RowLists`.
    """

    heap: UInt8[Array, "N B"]
    call: Call  # of this use of the window
    grouped: Int32[Array, "_"]
    counts: Int32[Array, "S"]
    tiles: Int32[Array, "_"]
    slots: Int32[Array, "R T K"]
    lists: RowLists = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int, int]:
        """That of the rows: `(R, T, D)`."""
        return (*self.slots.shape[:2], self.lists.place.layout.hidden)

    def array(self) -> Float[Array, "R T D"]:
        """A copy; rows without a slot here are zero. For fp8, widened to the layout's row dtype."""
        layout, (_, tokens, _) = self.lists.place.layout, self.shape
        place, after = self.lists.place, self.tiles
        rows = read_region("rows", place, self.heap, self.call, after)[:, :tokens]
        if layout.dispatch_dtype:
            rows = unpack_rows(rows, layout.hidden, jnp.dtype(layout.row_dtype))
        return jnp.where((self.slots >= 0).any(-1)[..., None], rows, 0)

    def weights(self) -> Float32[Array, "R T K"]:
        """The weights the sources sent; zero of choices that lie elsewhere."""
        place, after = self.lists.place, self.tiles
        found = read_region("weights", place, self.heap, self.call, after)
        return jnp.where(self.slots >= 0, found[:, : self.shape[1]], 0)


def dispatch_mosaic(
    x: Float[Array, "T D"],
    slots: Int32[Array, "T K"],
    weights: Float32[Array, "T K"],
    heap: UInt8[Array, "N B"],
    call: Call,
    place: ExchangeSpec,
    config: DispatchConfig,
    *,
    stand_in: bool = False,
):
    """As `dispatch.api.dispatch`, but the rows are a RowsInWindow: one kernel.

    With `stand_in`, for measuring one rank of a loopback, it also posts the others' flags.
    """
    lists = RowLists(place, *slots.shape, config.tile_rows)
    sending = Sending.of(slots.shape, place, config, config.groups or lists.groups)
    threads = sending.threads

    def body(rows, slots, weights, heap_ref, *rest):
        refs, rest = (
            ExchangeScalars(*rest[: len(ExchangeScalars._fields)]),
            rest[len(ExchangeScalars._fields) :],
        )
        suspicion, vote, *listed, ticket, heard, failed, largest, counts = rest
        heap = open_heap(place, heap_ref, refs.round, refs.rank)
        sending.write(rows, slots, weights, heap, refs)
        with peers.when(is_last_block(heap, DISPATCH_DONE, sending.blocks, ticket)):
            out = ArrivalFlags(suspicion, heard, failed)
            _arrive(heap, refs, out, largest, vote, lists, counts, listed, threads, stand_in)

    found = simt(
        body,
        *sending.operands(x, slots, weights),
        heap,
        *exchange_scalars(call),
        out={"suspicion": ((place.ranks,), jnp.int32), "vote": ((1,), jnp.uint32)} | lists.out,
        grid=sending.blocks,
        name="dispatch",
        groups=sending.groups,
        shared=(1, place.ranks, 1, 1, lists.slots),
    )
    return _received(found, slots.shape, heap, call, lists)


def send(x, slots, weights, heap, call: Call, place: ExchangeSpec, config: DispatchConfig):
    """The first half of `dispatch_mosaic`, for ranks that take turns: writes, and posts the round.

    There no rank may wait before all have posted. Returns an array that is there once it is done.
    """
    sending = Sending.of(slots.shape, place, config, 1)

    def body(rows, slots, weights, heap_ref, *rest):
        *rest, done, ticket = rest
        refs = ExchangeScalars(*rest)
        heap = open_heap(place, heap_ref, refs.round, refs.rank)
        sending.write(rows, slots, weights, heap, refs)
        with peers.when(is_last_block(heap, DISPATCH_DONE, sending.blocks, ticket)):
            is_partner, _ = partner_test(refs.active, refs.suspicion, heap.rank)
            tell_partners("sent", heap, refs, is_partner, sending.threads)
            with peers.when(peers.thread() == 0):
                peers.store(peers.address(done), peers.word(1))

    return simt(
        body,
        *sending.operands(x, slots, weights),
        heap,
        *exchange_scalars(call),
        out={"done": ((1,), jnp.int32)},
        grid=sending.blocks,
        name="dispatch_send",
        groups=sending.groups,
        shared=(1,),
    )["done"]


def receive(
    shape: tuple[int, int], heap, call: Call, sent, place: ExchangeSpec, config: DispatchConfig
):
    """The second half: posts once more, waits, and lists what came by slot.

    `sent` is the output of `send`, shape (T, K).
    """
    lists = RowLists(place, *shape, config.tile_rows)
    threads = GROUP_THREADS * lists.groups

    def body(heap_ref, *rest):
        refs, rest = (
            ExchangeScalars(*rest[: len(ExchangeScalars._fields)]),
            rest[len(ExchangeScalars._fields) :],
        )
        _, suspicion, vote, *listed, heard, failed, largest, counts = rest
        heap = open_heap(place, heap_ref, refs.round, refs.rank)
        out = ArrivalFlags(suspicion, heard, failed)
        _arrive(heap, refs, out, largest, vote, lists, counts, listed, threads)

    found = simt(
        body,
        heap,
        *exchange_scalars(call),
        sent,
        out={"suspicion": ((place.ranks,), jnp.int32), "vote": ((1,), jnp.uint32)} | lists.out,
        grid=1,
        name="dispatch_receive",
        groups=lists.groups,
        shared=(place.ranks, 1, 1, lists.slots),
    )
    return _received(found, shape, heap, call, lists)


def _arrive(
    heap: Heap,
    refs: ExchangeScalars,
    out: ArrivalFlags,
    largest,
    vote,
    lists: RowLists,
    counts,
    listed,
    threads: int,
    stand_in: bool = False,
) -> None:
    """Part of a kernel: one block posts and waits, and lists what came."""
    forget_home(heap, refs)
    lists.clear(counts, threads)
    await_partners("sent", heap, refs, out, threads, stand_in)
    collect = lambda: lists.collect(heap, out.heard, counts, listed, threads)
    gather_votes(heap, refs, out.heard, largest, vote, threads, meanwhile=collect)


def _received(found: dict, shape: tuple[int, int], heap, call: Call, lists: RowLists):
    """What dispatch returns, of a kernel's outputs."""
    received = found["slots"].reshape(lists.place.ranks, *shape)
    rows = RowsInWindow(
        heap=heap,
        call=call,
        grouped=found["grouped"],
        counts=found["counts"],
        tiles=found["tiles"],
        slots=received,
        lists=lists,
    )
    return rows, received, rows.weights(), found["suspicion"], found["vote"].reshape(())


@dataclasses.dataclass(frozen=True)
class Sending:
    """The part of a kernel that writes rows, slots and weights into the partners' windows.

    `groups` warpgroups make a block; `parts` tokens share it.
    """

    place: ExchangeSpec
    tokens: int
    choices: int
    blocks: int
    groups: int
    parts: int

    @classmethod
    def of(cls, shape: tuple[int, int], place: ExchangeSpec, config: DispatchConfig, groups: int):
        """For (T, K). Threads that a row has no use for take another token."""
        tokens, choices = shape
        layout = place.layout
        chunks = layout.row_bytes // peers.VECTOR_BYTES
        if layout.dispatch_dtype:
            chunks = pieces(layout.hidden)
        parts = max(1, min(groups, groups * GROUP_THREADS // (1 << (chunks - 1).bit_length())))
        blocks = max(place.ranks, min(-(-tokens // parts), config.blocks // groups))
        return cls(place, tokens, choices, blocks, groups, parts)

    @property
    def threads(self) -> int:
        return self.groups * GROUP_THREADS

    def operands(self, x, slots, weights) -> tuple[Array, Array, Array]:
        return x.astype(self.place.layout.row_dtype), slots.reshape(-1), weights.reshape(-1)

    def write(self, rows, slots, weights, heap: Heap, refs: ExchangeScalars) -> None:
        thread, block, layout = peers.thread(), peers.block(), self.place.layout
        is_partner, _ = partner_test(refs.active, refs.suspicion, heap.rank)
        row_threads = self.threads // self.parts

        def send_token(token: Word) -> None:
            def targets():
                ranks = self._ranks(slots, token, heap, is_partner)
                return [(heap.region("rows", r, heap.rank, token), wanted) for r, wanted in ranks]

            source = peers.address(rows, token.wide() * (layout.hidden * 2))
            if layout.dispatch_dtype:
                send_narrowed(source, targets, layout.hidden, row_threads)
            else:
                peers.copy_row(source, targets, layout.row_bytes, row_threads)

        def send_metadata(peer: Word) -> None:
            def four(index: Word) -> None:
                offset = index.wide() * 16
                found = peers.load_words(peers.address(slots, offset), 4)
                shares = peers.load_wide(peers.address(weights, offset))
                per_rank = self.place.slots_per_rank
                here = [(s >= 0) & (s // per_rank == peer) for s in found]
                local = [
                    peers.select(h, s % per_rank, peers.word(-1))
                    for h, s in zip(here, found, strict=True)
                ]
                peers.store_words(heap.region("slots", peer, heap.rank) + offset, local)
                peers.store_wide(heap.region("weights", peer, heap.rank) + offset, shares)

            with peers.when(is_partner(peer)):
                peers.each(thread, self.tokens * self.choices // 4, self.threads, four)

        first = block * self.parts + thread // row_threads
        peers.each(first, self.tokens, self.blocks * self.parts, send_token)
        # The last blocks have the fewest tokens.
        last = peers.word(self.blocks - 1) - block
        peers.each(last, self.place.ranks, self.blocks, send_metadata)

    def _ranks(self, slots, token: Word, heap: Heap, is_partner) -> list[tuple[Word, Word]]:
        """Of each choice the rank that it makes the row travel to, and whether it does.

        A row travels once per rank, for the first of its choices that lies there: slots `[3 19 5]`
        with S=8 travel to ranks 0 and 2.
        """
        found = [peers.load(entry(slots, token * self.choices + k)) for k in range(self.choices)]
        there = [slot >= 0 for slot in found]
        owners = [
            peers.select(real, slot // self.place.slots_per_rank, heap.rank)
            for real, slot in zip(there, found, strict=True)
        ]
        heard = [real & is_partner(owner) for real, owner in zip(there, owners, strict=True)]
        return list(zip(owners, first_of_each(there, owners, heard), strict=True))
