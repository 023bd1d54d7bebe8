"""Combine on a GPU: results straight into their owner's window, summed there in float32.

Kernels: `combine_send` writes results into the windows of their tokens' owners and posts the round;
it is not needed if the expert GEMM wrote them (`ResultsAtHome`). `combine` posts, waits and sums.

In `combine`, block 0 posts the round, waits for the partners, and stores the outcome in
`ticket[HOME]`: the round, or the round with INCOMPLETE flipped. All blocks wait for that word, then
sum. Block 0 waits for partners only, never for a block of this grid, so blocks that have not
started delay no block, and the grid may exceed what the GPU runs at once.

Example: T=4, K=2, D=2048: a block of 128 threads sums 8 x 128 channels of a token, so a token has 2
parts and there are 8 items. With 3 blocks, block 1 prepares item 1, waits, sums it, then items 4
and 7.
"""

import functools
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, UInt8

from pallas_kernels import simt
from pallas_kernels.combine.config import CombineConfig
from pallas_kernels.exchange.call import Call, Choices, ExchangeSpec
from pallas_kernels.exchange.gpu import (
    COMBINE_DONE,
    GRACE_NS,
    HOME,
    INCOMPLETE,
    ArrivalFlags,
    ExchangeScalars,
    IsPartner,
    Turn,
    exchange_scalars,
    first_of_each,
)
from pallas_kernels.simt import GROUP_THREADS, Ref, Word, entry, word_at

CHANNELS = 8  # bf16 in one 16-byte access
ONE = 0x3F800000  # float32 1.0 by its bits

# (number of blocks, part of a kernel: (results, received slots, weights, turn, is_partner))
Writer = tuple[int, Callable[[Ref, Ref, Ref, Turn, IsPartner], None]]


@jax.named_scope("send home")
def send_home(
    results: Float[Array, "R T K D"],
    received: Choices,
    heap: UInt8[Array, "N B"],
    call: Call,
    spec: ExchangeSpec,
    config: CombineConfig,
) -> Int32[Array, "1"]:
    """Writes results into the windows of their tokens' owners, and posts the round.

    Only rows of choices received here are read. The output exists once this is done.
    `receive_home` posts the same round again.
    """
    slots, weights = received
    if spec.layout.combine == "per_choice":
        blocks, write = send_choices(results.shape, config)
        weights = slots  # not read; so dispatch need not copy the weights out
    else:
        blocks, write = send_sums(results.shape, config)

    def body(results: Ref, received: Ref, weights: Ref, heap_ref: Ref, *rest: Ref) -> None:
        refs, (done, ticket) = ExchangeScalars.split(rest)
        turn = Turn.open("returned", spec, heap_ref, refs, GROUP_THREADS, stand_in=config.stand_in)
        is_partner, _ = turn.partners()
        write(results, received, weights, turn, is_partner)
        # The last block's increment is after all blocks' writes: its post covers them.
        with simt.when(turn.is_last_block(COMBINE_DONE, blocks, ticket)):
            turn.clear_home()
            turn.post_to_partners(is_partner)
            with simt.when(simt.thread() == 0):
                simt.store(simt.address(done), simt.word(1))

    operands = (results.astype(spec.layout.row_dtype), slots.reshape(-1))
    operands += (weights.reshape(-1), heap, *exchange_scalars(call))
    done = {"done": ((1,), jnp.int32)}
    out = simt.kernel(body, *operands, out=done, grid=blocks, name="combine_send", shared=(1,))
    return out["done"]


def send_choices(shape: tuple[int, int, int, int], config: CombineConfig) -> Writer:
    """One row for each choice of `shape` (R, T, K, D), to `returns[rank, t, k]` of its source."""
    ranks, tokens, choices, hidden = shape
    row_bytes, blocks = hidden * 2, min(ranks * tokens, config.send_blocks)

    @simt.phase("send home")
    def write(results: Ref, received: Ref, weights: Ref, turn: Turn, is_partner: IsPartner) -> None:
        del weights
        heap = turn.heap

        def send_token(row: Word) -> None:
            home, token = row // tokens, row % tokens
            arrived = is_partner(home)
            pairs = [row * choices + choice for choice in range(choices)]
            mine = [simt.load(entry(received, pair)) >= 0 for pair in pairs]
            for choice, (pair, here) in enumerate(zip(pairs, mine, strict=True)):
                with simt.when(here & arrived):
                    target = heap.region("returns", home, heap.rank, token, choice)
                    source = simt.address(results, pair.wide() * row_bytes)
                    simt.copy_row(source, lambda to=(target, here): [to], row_bytes)

        simt.each(simt.block(), ranks * tokens, blocks, send_token)

    return blocks, write


def send_sums(shape: tuple[int, int, int, int], config: CombineConfig) -> Writer:
    """One row for each token: this rank's weighted sum over its choices, in the order of k."""
    ranks, tokens, choices, hidden = shape
    row_bytes, chunks = hidden * 2, hidden // CHANNELS
    whole = -(-chunks // GROUP_THREADS)  # chunks of a thread if a block took a whole row
    parts = -(-whole // config.sum_chunks)
    mine = -(-whole // parts)
    blocks = min(ranks * tokens * parts, config.send_blocks)

    @simt.phase("send home")
    def write(results: Ref, received: Ref, weights: Ref, turn: Turn, is_partner: IsPartner) -> None:
        heap = turn.heap

        def send_part(item: Word) -> None:
            row, part = item // parts, item % parts
            home, token = row // tokens, row % tokens
            pairs = [row * choices + choice for choice in range(choices)]
            here = [simt.load(entry(received, pair)) >= 0 for pair in pairs]
            shares = [simt.load(entry(weights, pair)) for pair in pairs]
            any_here = functools.reduce(lambda a, b: a | b, here)
            first = part * (mine * GROUP_THREADS) + simt.thread()
            places = [first + GROUP_THREADS * j for j in range(mine)]
            with simt.when(any_here & is_partner(home)):
                inside = [place < chunks for place in places]
                offsets = [place.wide() * 16 for place in places]
                totals = [simt.zero_f32x8() for _ in places]
                # Most choices of a token ran elsewhere; whole blocks branch around them.
                for pair, share, valid in zip(pairs, shares, here, strict=True):
                    start = simt.address(results, pair.wide() * row_bytes)

                    def add(start=start, share=share, valid=valid, totals=totals):
                        rows = [
                            simt.load_bf16x8_if(there, start + offset)
                            for there, offset in zip(inside, offsets, strict=True)
                        ]
                        return [
                            simt.scaled_add(total, share, values, valid)
                            for total, values in zip(totals, rows, strict=True)
                        ]

                    totals = simt.update_if(valid, totals, add)
                target = heap.region("returns", home, heap.rank, token)
                for there, offset, total in zip(inside, offsets, totals, strict=True):
                    with simt.when(there):
                        simt.store_bf16x8(target + offset, total)

        simt.each(simt.block(), ranks * tokens * parts, blocks, send_part)

    return blocks, write


def receive_home(
    choices: Choices,
    heap: UInt8[Array, "N B"],
    call: Call,
    sent: Array,
    spec: ExchangeSpec,
    config: CombineConfig,
) -> tuple[Float32[Array, "T D"], Int32[Array, "R"]]:
    """Posts, waits and sums: returns y and suspicion.

    `sent` is an output of the kernel that wrote this rank's results. Rows of ranks that did not
    come are not read.
    """
    layout, (tokens, per_token) = spec.layout, choices.slots.shape
    parts = -(-layout.hidden // CHANNELS // GROUP_THREADS)
    blocks = min(tokens * parts, config.sum_blocks)

    def body(slots: Ref, weights: Ref, heap_ref: Ref, *rest: Ref) -> None:
        refs, (_, y, suspicion, arrived, failed, news) = ExchangeScalars.split(rest)
        turn = Turn.open("returned", spec, heap_ref, refs, GROUP_THREADS, stand_in=config.stand_in)
        block, thread = simt.block(), simt.thread()
        home = turn.heap.region("ticket", turn.heap.rank, HOME)
        current = word_at(refs.round)
        incomplete = current ^ INCOMPLETE
        summing = Summing(spec, turn, slots, weights, suspicion, per_token, parts)
        first = summing.prepare(block)  # these loads overlap with the wait
        with simt.when(block == 0):
            turn.await_partners(ArrivalFlags(suspicion, arrived, failed))
            simt.barrier()  # After: thread 0 has written this rank's own suspicion.
            with simt.when(thread == 0):
                all_came = simt.load(simt.address(failed)) == 0
                simt.post_on_gpu(home, simt.select(all_came, current, incomplete))
        with simt.when(thread == 0):
            limit_ns = word_at(refs.deadline_ms).wide() * 1_000_000 + GRACE_NS
            came = simt.wait_on_gpu(home, current, incomplete, simt.now_ns(), limit_ns)
            simt.store(simt.address(news), came)
        simt.barrier()  # After: rows of all ranks without suspicion may be read by all threads.
        all_came = simt.load(simt.address(news)) == 1
        summing.run(first, all_came, y)
        following = lambda item: summing.run(summing.prepare(item), all_came, y)
        simt.each(block + blocks, tokens * parts, blocks, following)

    operands = (choices.slots.reshape(-1), choices.weights.reshape(-1))
    found = simt.kernel(
        body,
        *operands,
        heap,
        *exchange_scalars(call),
        sent,
        out={
            "y": ((tokens, layout.hidden), jnp.float32),
            "suspicion": ((spec.ranks,), jnp.int32),
        },
        grid=blocks,
        name="combine",
        shared=(spec.ranks, 1, 1),
    )
    return found["y"], found["suspicion"]


class Item(typing.NamedTuple):
    """Work of a thread: CHANNELS channels of a token, and where the token's choices ran."""

    token: Word
    chunk: Word
    owners: list[Word]
    there: list[Word]  # whether the choice ran on a partner
    shares: list[Word]


class Summing(typing.NamedTuple):
    """Weighted sums, as a part of a kernel; the arrays are references."""

    spec: ExchangeSpec
    turn: Turn
    slots: Int32[Array, "_"]
    weights: Float32[Array, "_"]
    suspicion: Int32[Array, "R"]  # the kernel's output; read only if not all partners came
    choices: int
    parts: int

    def prepare(self, item: Word) -> Item:
        """Loads that need no flag."""
        token = item // self.parts
        chunk = item % self.parts * GROUP_THREADS + simt.thread()
        at = [token * self.choices + k for k in range(self.choices)]
        found = [simt.load(entry(self.slots, choice)) for choice in at]
        shares = [simt.load(entry(self.weights, choice)) for choice in at]
        own = self.turn.heap.rank
        owners = [simt.select(s >= 0, s // self.spec.slots_per_rank, own) for s in found]
        is_partner, _ = self.turn.partners()
        there = [(s >= 0) & is_partner(owner) for s, owner in zip(found, owners, strict=True)]
        return Item(token, chunk, owners, there, shares)

    @simt.phase("sum")
    def run(self, item: Item, all_came: Word, y: Ref) -> None:
        """Sums and writes; skips rows of suspected ranks, and all rows of an aborted step."""
        layout, heap = self.spec.layout, self.turn.heap
        late = all_came ^ 1
        ended = simt.load_if(late, entry(self.suspicion, heap.rank)) != 0
        with simt.when(item.chunk < layout.hidden // CHANNELS):
            offset, rows, per_choice = item.chunk.wide() * 16, [], layout.combine == "per_choice"
            wanted = item.there
            if not per_choice:  # a rank sent one sum, however many of the choices it ran
                wanted = first_of_each(item.there, item.owners, item.there)
            for k, (owner, good) in enumerate(zip(item.owners, wanted, strict=True)):
                missing = simt.load_if(late, entry(self.suspicion, owner)) != 0
                good = good & (missing ^ 1) & (ended ^ 1)
                at = heap.region("returns", heap.rank, owner, item.token, *[k] * per_choice)
                share = item.shares[k] if per_choice else simt.word(ONE)
                rows.append((good, share, simt.load_bf16x8_if(good, at + offset)))
            total = simt.zero_f32x8()
            for good, share, values in rows:
                total = simt.scaled_add(total, share, values, good)
            row = simt.address(y, item.token.wide() * (layout.hidden * 4))
            simt.store_f32x8(row + item.chunk.wide() * 32, total)
