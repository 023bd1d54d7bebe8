"""Dispatch on a GPU: rows straight into peers' windows, read by the experts where they arrive.

One kernel, `dispatch`. Its blocks write rows, slots and weights into the partners' windows. Each
block then counts itself done with an acq_rel increment; the last one knows that everything is
written, posts the round to all partners, waits for their rounds, and groups what came by slot.
No other block waits, so the grid may exceed what the GPU runs at once.

Example: 3 ranks, S=8, T=4, K=3, one token per block, 4 blocks. Token 0 has the slots [3 19 5],
owned by ranks 0, 2, 0: block 0 writes its row twice, to `rows[half, me, 0]` of ranks 0 and 2. Slots
are sent from the last block on, which has the fewest tokens: for token 0 block 3 writes [3 -1 5] to
rank 0, block 1 writes [-1 3 -1] to rank 2. The four increments of the ticket return 0 to 3; the
block that reads 3 posts three flags and waits for three.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, UInt8, UInt32

from pallas_kernels import simt
from pallas_kernels.dispatch.config import DispatchConfig
from pallas_kernels.dispatch.rows import pieces, send_narrowed
from pallas_kernels.exchange.call import Call, Choices, ExchangeSpec
from pallas_kernels.exchange.gpu import (
    DISPATCH_DONE,
    ArrivalFlags,
    ExchangeScalars,
    IsPartner,
    Turn,
    exchange_scalars,
    first_of_each,
)
from pallas_kernels.exchange.lists import RowLists
from pallas_kernels.grouping import ExpertRows
from pallas_kernels.handover import RowsInWindow
from pallas_kernels.simt import GROUP_THREADS, Ref, Word, entry

Received = tuple[RowsInWindow, Choices, Int32[Array, "R"], UInt32[Array, ""]]


def dispatch_mosaic(
    x: Float[Array, "T D"],
    choices: Choices,
    heap: UInt8[Array, "N B"],
    call: Call,
    spec: ExchangeSpec,
    config: DispatchConfig,
) -> Received:
    """Like `dispatch.api.dispatch`, in one kernel; the rows are a RowsInWindow."""
    lists = RowLists(spec, *choices.slots.shape, config.tile_rows)
    sending = Sending.of(choices.slots.shape, spec, config, config.groups or lists.groups)

    def body(rows: Ref, slots: Ref, weights: Ref, heap_ref: Ref, *rest: Ref) -> None:
        refs, rest = ExchangeScalars.split(rest)
        *outs, ticket, arrived, failed, largest, counts = rest
        turn = Turn.open("sent", spec, heap_ref, refs, sending.threads, stand_in=config.stand_in)
        sending.write(rows, slots, weights, turn)
        with simt.when(turn.is_last_block(DISPATCH_DONE, sending.blocks, ticket)):
            _arrive(turn, lists, outs, (arrived, failed, largest, counts))

    found = simt.kernel(
        body,
        *sending.operands(x, choices),
        heap,
        *exchange_scalars(call),
        out=_outputs(lists),
        grid=sending.blocks,
        name="dispatch",
        groups=sending.groups,
        shared=(1, *_shared(lists)),
    )
    return _received(found, choices.slots.shape, heap, call, lists)


def send(
    x: Float[Array, "T D"],
    choices: Choices,
    heap: UInt8[Array, "N B"],
    call: Call,
    spec: ExchangeSpec,
    config: DispatchConfig,
) -> Int32[Array, "1"]:
    """The first half of `dispatch_mosaic`, for ranks that take turns: writes, and posts the round.

    There no rank may wait before all have posted. The output exists once this is done.
    """
    sending = Sending.of(choices.slots.shape, spec, config, 1)

    def body(rows: Ref, slots: Ref, weights: Ref, heap_ref: Ref, *rest: Ref) -> None:
        refs, (done, ticket) = ExchangeScalars.split(rest)
        turn = Turn.open("sent", spec, heap_ref, refs, sending.threads)
        sending.write(rows, slots, weights, turn)
        with simt.when(turn.is_last_block(DISPATCH_DONE, sending.blocks, ticket)):
            is_partner, _ = turn.partners()
            turn.post_to_partners(is_partner)
            with simt.when(simt.thread() == 0):
                simt.store(simt.address(done), simt.word(1))

    return simt.kernel(
        body,
        *sending.operands(x, choices),
        heap,
        *exchange_scalars(call),
        out={"done": ((1,), jnp.int32)},
        grid=sending.blocks,
        name="dispatch_send",
        groups=sending.groups,
        shared=(1,),
    )["done"]


def receive(
    shape: tuple[int, int],
    heap: UInt8[Array, "N B"],
    call: Call,
    sent: Int32[Array, "1"],
    spec: ExchangeSpec,
    config: DispatchConfig,
) -> Received:
    """The second half: posts once more, waits, and groups what came by slot.

    `sent` is the output of `send`, `shape` (T, K).
    """
    lists = RowLists(spec, *shape, config.tile_rows)

    def body(heap_ref: Ref, *rest: Ref) -> None:
        refs, (_, *outs, arrived, failed, largest, counts) = ExchangeScalars.split(rest)
        turn = Turn.open("sent", spec, heap_ref, refs, GROUP_THREADS * lists.groups)
        _arrive(turn, lists, outs, (arrived, failed, largest, counts))

    found = simt.kernel(
        body,
        heap,
        *exchange_scalars(call),
        sent,
        out=_outputs(lists),
        grid=1,
        name="dispatch_receive",
        groups=lists.groups,
        shared=_shared(lists),
    )
    return _received(found, shape, heap, call, lists)


def _outputs(lists: RowLists) -> dict:
    ranks = lists.spec.ranks
    return {"suspicion": ((ranks,), jnp.int32), "vote": ((1,), jnp.uint32)} | lists.out


def _shared(lists: RowLists) -> tuple[int, ...]:
    """Lengths of `arrived`, `failed`, `largest` and `counts`."""
    return lists.spec.ranks, 1, 1, lists.slots


def _arrive(turn: Turn, lists: RowLists, outs: list, shared: tuple) -> None:
    """Part of a kernel: one block posts, waits, and groups what came."""
    (suspicion, vote, *listed), (arrived, failed, largest, counts) = outs, shared
    turn.clear_home()
    lists.clear(counts, turn.threads)  # Complete after the barriers of await_partners.
    turn.await_partners(ArrivalFlags(suspicion, arrived, failed))
    collect = lambda: lists.collect(turn.heap, arrived, counts, listed, turn.threads)
    turn.gather_votes(arrived, largest, vote, meanwhile=collect)


def _received(
    found: dict, shape: tuple[int, int], heap: UInt8[Array, "N B"], call: Call, lists: RowLists
) -> Received:
    """The results of dispatch, from a kernel's outputs."""
    slots = found["slots"].reshape(lists.spec.ranks, *shape)
    rows = RowsInWindow(
        heap=heap,
        call=call,
        slots=slots,
        lists=ExpertRows(*(found[name] for name in ExpertRows._fields)),
        spec=lists.spec,
        tile_rows=lists.tile_rows,
    )
    received = Choices(slots, rows.weights())
    return rows, received, found["suspicion"], found["vote"].reshape(())


@dataclasses.dataclass(frozen=True)
class Sending:
    """Writes rows, slots and weights into the partners' windows, as a part of a kernel.

    `groups` warpgroups make a block; `parts` tokens share it.
    """

    spec: ExchangeSpec
    tokens: int
    choices: int
    blocks: int
    groups: int
    parts: int

    @classmethod
    def of(
        cls, shape: tuple[int, int], spec: ExchangeSpec, config: DispatchConfig, groups: int
    ) -> "Sending":
        """For (T, K). Threads for which a row has no work take another token."""
        tokens, choices = shape
        layout = spec.layout
        chunks = layout.row_bytes // simt.VECTOR_BYTES
        if layout.dispatch_dtype:
            chunks = pieces(layout.hidden)
        parts = max(1, min(groups, groups * GROUP_THREADS // (1 << (chunks - 1).bit_length())))
        blocks = max(spec.ranks, min(-(-tokens // parts), config.blocks // groups))
        return cls(spec, tokens, choices, blocks, groups, parts)

    @property
    def threads(self) -> int:
        return self.groups * GROUP_THREADS

    def operands(
        self, x: Float[Array, "T D"], choices: Choices
    ) -> tuple[Float[Array, "T D"], Int32[Array, "_"], Float32[Array, "_"]]:
        """The kernel's operands that `write` is given references to."""
        rows = x.astype(self.spec.layout.row_dtype)
        return rows, choices.slots.reshape(-1), choices.weights.reshape(-1)

    @simt.phase("send")
    def write(self, rows: Ref, slots: Ref, weights: Ref, turn: Turn) -> None:
        """Part of a kernel, called by all threads of all blocks.

        No window holds this round's flag of this rank before all of it is written.
        """
        thread, block, layout, heap = simt.thread(), simt.block(), self.spec.layout, turn.heap
        is_partner, _ = turn.partners()
        row_threads = self.threads // self.parts

        def send_token(token: Word) -> None:
            def targets() -> list[tuple[Word, Word]]:
                ranks = self._ranks(slots, token, heap.rank, is_partner)
                return [(heap.region("rows", r, heap.rank, token), wanted) for r, wanted in ranks]

            source = simt.address(rows, token.wide() * (layout.hidden * 2))
            if layout.dispatch_dtype:
                send_narrowed(source, targets, layout.hidden, row_threads)
            else:
                simt.copy_row(source, targets, layout.row_bytes, row_threads)

        def send_metadata(peer: Word) -> None:
            def four(index: Word) -> None:
                offset = index.wide() * 16
                found = simt.load_words(simt.address(slots, offset), 4)
                shares = simt.load_wide(simt.address(weights, offset))
                per_rank = self.spec.slots_per_rank
                here = [(s >= 0) & (s // per_rank == peer) for s in found]
                local = [
                    simt.select(h, s % per_rank, simt.word(-1))
                    for h, s in zip(here, found, strict=True)
                ]
                simt.store_words(heap.region("slots", peer, heap.rank) + offset, local)
                simt.store_wide(heap.region("weights", peer, heap.rank) + offset, shares)

            with simt.when(is_partner(peer)):
                simt.each(thread, self.tokens * self.choices // 4, self.threads, four)

        first = block * self.parts + thread // row_threads
        simt.each(first, self.tokens, self.blocks * self.parts, send_token)
        # The last blocks have the fewest tokens.
        last = simt.word(self.blocks - 1) - block
        simt.each(last, self.spec.ranks, self.blocks, send_metadata)

    def _ranks(
        self, slots: Ref, token: Word, own: Word, is_partner: IsPartner
    ) -> list[tuple[Word, Word]]:
        """For each choice the rank it sends the row to, and whether it does.

        A row travels once per rank, for the first of its choices there: slots `[3 19 5]` with S=8
        travel to ranks 0 and 2.
        """
        found = [simt.load(entry(slots, token * self.choices + k)) for k in range(self.choices)]
        there = [slot >= 0 for slot in found]
        owners = [
            simt.select(real, slot // self.spec.slots_per_rank, own)
            for real, slot in zip(there, found, strict=True)
        ]
        arrived = [real & is_partner(owner) for real, owner in zip(there, owners, strict=True)]
        return list(zip(owners, first_of_each(there, owners, arrived), strict=True))
