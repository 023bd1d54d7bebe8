"""Combine on a GPU: results straight into their owner's window, summed there in float32."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, UInt8

from pallas_kernels import peers
from pallas_kernels.call import Call
from pallas_kernels.combine.config import CombineConfig
from pallas_kernels.gpu import (
    COMBINE_DONE,
    GRACE_NS,
    GROUP_THREADS,
    HOME,
    INCOMPLETE,
    ArrivalFlags,
    ExchangeScalars,
    ExchangeSpec,
    Heap,
    await_partners,
    entry,
    exchange_scalars,
    first_of_each,
    forget_home,
    is_last_block,
    open_heap,
    partner_test,
    simt,
    tell_partners,
    word_at,
)
from pallas_kernels.peers import Word

CHANNELS = 8  # bf16 in one 16-byte access
ONE = 0x3F800000  # float32 1.0 by its bits


@jax.tree_util.register_dataclass
@typing.no_type_check  # leaves may be abstract under tree.map
@dataclasses.dataclass(frozen=True, kw_only=True)
class ResultsAtHome:
    """Results that the expert GEMM wrote into their owners' windows; only the flags are missing."""

    written: Array  # is there once all of them are
    shape: tuple[int, int, int, int] = dataclasses.field(metadata={"static": True})  # (R, T, K, D)


def combine_mosaic(
    results: "Float[Array, 'R T K D'] | ResultsAtHome",
    received: Int32[Array, "R T K"],
    sent_weights: Float32[Array, "R T K"],
    slots: Int32[Array, "T K"],
    weights: Float32[Array, "T K"],
    heap: UInt8[Array, "N B"],
    call: Call,
    place: ExchangeSpec,
    config: CombineConfig,
) -> tuple[Float32[Array, "T D"], Int32[Array, "R"]]:
    """As `combine.api.combine`. Of `results` only rows of choices received here are read."""
    if isinstance(results, ResultsAtHome):
        sent = results.written
    else:
        sent = send_home(results, received, sent_weights, heap, call, place, config)
    return receive_home(slots, weights, heap, call, sent, place, config)


def send_home(
    results,
    received,
    sent_weights,
    heap,
    call: Call,
    place: ExchangeSpec,
    config: CombineConfig,
    *,
    stand_in: bool = False,
):
    """Writes results into the windows of their tokens' owners, and posts the round.

    Returns an array that is there once that is done. `receive_home` posts the same round again.
    With `stand_in`, for measuring one rank of a loopback, it also posts the others' flags.
    """
    if place.layout.combine == "per_choice":
        blocks, write = send_choices(results, place, config)
        sent_weights = received  # not read, and then dispatch need not copy them out
    else:
        blocks, write = send_sums(results, place, config)

    def body(results, received, weights, heap_ref, *rest):
        *rest, done, ticket = rest
        refs = ExchangeScalars(*rest)
        heap = open_heap(place, heap_ref, refs.round, refs.rank)
        is_partner, _ = partner_test(refs.active, refs.suspicion, heap.rank)
        write(results, received, weights, heap, is_partner)
        with peers.when(is_last_block(heap, COMBINE_DONE, blocks, ticket)):
            forget_home(heap, refs)
            tell_partners("returned", heap, refs, is_partner, GROUP_THREADS, stand_in)
            with peers.when(peers.thread() == 0):
                peers.store(peers.address(done), peers.word(1))

    operands = (results.astype(place.layout.row_dtype), received.reshape(-1))
    operands += (sent_weights.reshape(-1), heap, *exchange_scalars(call))
    done = {"done": ((1,), jnp.int32)}
    return simt(body, *operands, out=done, grid=blocks, name="combine_send", shared=(1,))["done"]


def send_choices(results, place: ExchangeSpec, config: CombineConfig):
    """One row for each choice, to `returns[rank, t, k]` of its source: (blocks, part of a kernel).

    The part is `(results, received, weights, heap, is_partner)`.
    """
    ranks, tokens, choices, hidden = results.shape
    row_bytes, blocks = hidden * 2, min(ranks * tokens, config.send_blocks)

    def write(results, received, weights, heap: Heap, is_partner) -> None:
        del weights

        def send_token(row: Word) -> None:
            home, token = row // tokens, row % tokens
            heard = is_partner(home)
            pairs = [row * choices + choice for choice in range(choices)]
            mine = [peers.load(entry(received, pair)) >= 0 for pair in pairs]
            for choice, (pair, here) in enumerate(zip(pairs, mine, strict=True)):
                with peers.when(here & heard):
                    target = heap.region("returns", home, heap.rank, token, choice)
                    source = peers.address(results, pair.wide() * row_bytes)
                    peers.copy_row(source, lambda to=(target, here): [to], row_bytes)

        peers.each(peers.block(), ranks * tokens, blocks, send_token)

    return blocks, write


def send_sums(results, place: ExchangeSpec, config: CombineConfig):
    """One row for each token: this rank's weighted sum over its choices, in the order of k.

    As `send_choices`.
    """
    ranks, tokens, choices, hidden = results.shape
    row_bytes, chunks = hidden * 2, hidden // CHANNELS
    whole = -(-chunks // GROUP_THREADS)  # chunks of a thread, were a block to take a whole row
    parts = -(-whole // config.sum_chunks)
    mine = -(-whole // parts)
    blocks = min(ranks * tokens * parts, config.send_blocks)

    def write(results, received, weights, heap: Heap, is_partner) -> None:
        def send_part(item: Word) -> None:
            row, part = item // parts, item % parts
            home, token = row // tokens, row % tokens
            pairs = [row * choices + choice for choice in range(choices)]
            here = [peers.load(entry(received, pair)) >= 0 for pair in pairs]
            shares = [peers.load(entry(weights, pair)) for pair in pairs]
            any_here = functools.reduce(lambda a, b: a | b, here)
            first = part * (mine * GROUP_THREADS) + peers.thread()
            places = [first + GROUP_THREADS * j for j in range(mine)]
            with peers.when(any_here & is_partner(home)):
                inside = [place < chunks for place in places]
                offsets = [place.wide() * 16 for place in places]
                totals = [peers.zero_f32x8() for _ in places]
                # Most choices of a token ran elsewhere: whole blocks pass them by.
                for pair, share, valid in zip(pairs, shares, here, strict=True):
                    start = peers.address(results, pair.wide() * row_bytes)

                    def add(start=start, share=share, valid=valid, totals=totals):
                        rows = [
                            peers.load_bf16x8_if(there, start + offset)
                            for there, offset in zip(inside, offsets, strict=True)
                        ]
                        return [
                            peers.scaled_add(total, share, values, valid)
                            for total, values in zip(totals, rows, strict=True)
                        ]

                    totals = peers.update_if(valid, totals, add)
                target = heap.region("returns", home, heap.rank, token)
                for there, offset, total in zip(inside, offsets, totals, strict=True):
                    with peers.when(there):
                        peers.store_bf16x8(target + offset, total)

        peers.each(peers.block(), ranks * tokens * parts, blocks, send_part)

    return blocks, write


def receive_home(
    slots,
    weights,
    heap,
    call: Call,
    sent,
    place: ExchangeSpec,
    config: CombineConfig,
    *,
    stand_in: bool = False,
):
    """Posts, waits and sums: returns y and suspicion. `sent` is there once results are written.

    `y[t]` is made of the rows that came home; rows of ranks that were not heard are not read. With
    `stand_in`, for measuring one rank of a loopback, it also posts the others' flags.
    """
    layout, (tokens, choices) = place.layout, slots.shape
    parts = -(-layout.hidden // CHANNELS // GROUP_THREADS)
    blocks = min(tokens * parts, config.sum_blocks)

    def body(slots, weights, heap_ref, *rest):
        refs, rest = (
            ExchangeScalars(*rest[: len(ExchangeScalars._fields)]),
            rest[len(ExchangeScalars._fields) :],
        )
        _, y, suspicion, heard, failed, news = rest
        heap = open_heap(place, heap_ref, refs.round, refs.rank)
        block, thread = peers.block(), peers.thread()
        home = heap.region("ticket", heap.rank, HOME)
        current = word_at(refs.round)
        incomplete = current ^ INCOMPLETE
        summing = Summing(place, slots, weights, heap, refs, suspicion, choices, parts)
        first = summing.prepare(block)  # under way while this block waits
        with peers.when(block == 0):
            out = ArrivalFlags(suspicion, heard, failed)
            await_partners("returned", heap, refs, out, GROUP_THREADS, stand_in)
            peers.barrier()
            with peers.when(thread == 0):
                all_came = peers.load(peers.address(failed)) == 0
                peers.post_near(home, peers.select(all_came, current, incomplete))
        # The first block waits for partners only, so a block that has not begun keeps nobody.
        with peers.when(thread == 0):
            limit_ns = word_at(refs.deadline_ms).wide() * 1_000_000 + GRACE_NS
            came = peers.wait_near(home, current, incomplete, peers.now_ns(), limit_ns)
            peers.store(peers.address(news), came)
        peers.barrier()
        all_came = peers.load(peers.address(news)) == 1
        summing.run(first, all_came, y)
        following = lambda item: summing.run(summing.prepare(item), all_came, y)
        peers.each(block + blocks, tokens * parts, blocks, following)

    operands = (slots.reshape(-1), weights.reshape(-1), heap, *exchange_scalars(call), sent)
    found = simt(
        body,
        *operands,
        out={
            "y": ((tokens, layout.hidden), jnp.float32),
            "suspicion": ((place.ranks,), jnp.int32),
        },
        grid=blocks,
        name="combine",
        shared=(place.ranks, 1, 1),
    )
    return found["y"], found["suspicion"]


class Item(typing.NamedTuple):
    """What a thread sums: a part of a token's channels, and where its choices ran."""

    token: Word
    chunk: Word
    owners: list[Word]
    there: list[Word]  # whether the choice ran at a partner
    shares: list[Word]


class Summing(typing.NamedTuple):
    """The part of a kernel that sums: each thread CHANNELS channels of a token, by choice."""

    place: ExchangeSpec
    slots: Array
    weights: Array
    heap: Heap
    refs: ExchangeScalars
    suspicion: Array  # the kernel's output; read only where not all partners came
    choices: int
    parts: int

    def prepare(self, item: Word) -> Item:
        """What may be read before the rows are there."""
        token = item // self.parts
        chunk = item % self.parts * GROUP_THREADS + peers.thread()
        at = [token * self.choices + k for k in range(self.choices)]
        found = [peers.load(entry(self.slots, choice)) for choice in at]
        shares = [peers.load(entry(self.weights, choice)) for choice in at]
        own = self.heap.rank
        owners = [peers.select(s >= 0, s // self.place.slots_per_rank, own) for s in found]
        is_partner, _ = partner_test(self.refs.active, self.refs.suspicion, own)
        there = [(s >= 0) & is_partner(owner) for s, owner in zip(found, owners, strict=True)]
        return Item(token, chunk, owners, there, shares)

    def run(self, item: Item, all_came: Word, y) -> None:
        """Sums and writes. A suspected rank's rows are left out, and all of an aborted step's."""
        layout, heap = self.place.layout, self.heap
        late = all_came ^ 1
        ended = peers.load_if(late, entry(self.suspicion, heap.rank)) != 0
        with peers.when(item.chunk < layout.hidden // CHANNELS):
            offset, rows, per_choice = item.chunk.wide() * 16, [], layout.combine == "per_choice"
            wanted = item.there
            if not per_choice:  # a rank's sum is there once, however many of the choices it ran
                wanted = first_of_each(item.there, item.owners, item.there)
            for k, (owner, good) in enumerate(zip(item.owners, wanted, strict=True)):
                missing = peers.load_if(late, entry(self.suspicion, owner)) != 0
                good = good & (missing ^ 1) & (ended ^ 1)
                at = heap.region("returns", heap.rank, owner, item.token, *[k] * per_choice)
                share = item.shares[k] if per_choice else peers.word(ONE)
                rows.append((good, share, peers.load_bf16x8_if(good, at + offset)))
            total = peers.zero_f32x8()
            for good, share, values in rows:
                total = peers.scaled_add(total, share, values, good)
            row = peers.address(y, item.token.wide() * (layout.hidden * 4))
            peers.store_f32x8(row + item.chunk.wide() * 32, total)
