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
    Heap,
    Heard,
    Place,
    Told,
    await_partners,
    entry,
    forget_home,
    is_last_block,
    open_heap,
    partner_test,
    simt,
    tell_partners,
    told,
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
    rank,
    place: Place,
    config: CombineConfig,
) -> tuple[Float32[Array, "T D"], Int32[Array, "R"]]:
    """As `combine.api.combine`. Of `results` only rows of choices received here are read."""
    if isinstance(results, ResultsAtHome):
        sent = results.written
    else:
        sent = send_home(results, received, sent_weights, heap, call, rank, place, config)
    return receive_home(slots, weights, heap, call, rank, sent, place, config)


def send_home(
    results,
    received,
    sent_weights,
    heap,
    call: Call,
    rank,
    place: Place,
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
        refs = Told(*rest)
        world = open_heap(place, heap_ref, refs.round, refs.rank)
        is_partner, _ = partner_test(refs.active, refs.suspicion, world.rank)
        write(results, received, weights, world, is_partner)
        with peers.when(is_last_block(world, COMBINE_DONE, blocks, ticket)):
            forget_home(world)
            tell_partners("returned", world, refs, is_partner, GROUP_THREADS, stand_in)
            with peers.when(peers.thread() == 0):
                peers.store(peers.address(done), peers.word(1))

    operands = (results.astype(place.layout.row_dtype), received.reshape(-1))
    operands += (sent_weights.reshape(-1), heap, *told(call, rank))
    done = {"done": ((1,), jnp.int32)}
    return simt(body, *operands, out=done, grid=blocks, name="combine_send", shared=(1,))["done"]


def send_choices(results, place: Place, config: CombineConfig):
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


def send_sums(results, place: Place, config: CombineConfig):
    """One row for each token: this rank's weighted sum over its choices, in the order of k.

    As `send_choices`.
    """
    ranks, tokens, choices, hidden = results.shape
    row_bytes, chunks = hidden * 2, hidden // CHANNELS
    parts = -(-chunks // GROUP_THREADS)
    blocks = min(ranks * tokens * parts, config.send_blocks)

    def write(results, received, weights, heap: Heap, is_partner) -> None:
        def send_part(item: Word) -> None:
            row, chunk = item // parts, item % parts * GROUP_THREADS + peers.thread()
            home, token = row // tokens, row % tokens
            pairs = [row * choices + choice for choice in range(choices)]
            mine = [peers.load(entry(received, pair)) >= 0 for pair in pairs]
            any_mine = mine[0]
            for other in mine[1:]:
                any_mine = any_mine | other
            heard = is_partner(home)
            with peers.when(any_mine & heard & (chunk < chunks)):
                offset, total = chunk.wide() * 16, peers.zero_f32x8()
                for pair, valid in zip(pairs, mine, strict=True):
                    at = peers.address(results, pair.wide() * row_bytes) + offset
                    share = peers.load(entry(weights, pair))
                    # Most choices of a token ran elsewhere: their rows here hold nothing.
                    rows = peers.load_bf16x8_if(valid, at)
                    total = peers.scaled_add(total, share, rows, valid)
                target = heap.region("returns", home, heap.rank, token) + offset
                peers.store_bf16x8(target, total)

        peers.each(peers.block(), ranks * tokens * parts, blocks, send_part)

    return blocks, write


def receive_home(slots, weights, heap, call: Call, rank, sent, place: Place, config: CombineConfig):
    """Posts, waits and sums: returns y and suspicion. `sent` is there once results are written.

    `y[t]` is made of the rows that came home; rows of ranks that were not heard are not read.
    """
    layout, (tokens, choices) = place.layout, slots.shape
    chunks = layout.hidden // CHANNELS
    parts = -(-chunks // GROUP_THREADS)
    blocks = min(tokens * parts, config.sum_blocks)

    def body(slots, weights, heap_ref, *rest):
        refs, rest = Told(*rest[: len(Told._fields)]), rest[len(Told._fields) :]
        _, y, suspicion, wish, heard, words = rest
        world = open_heap(place, heap_ref, refs.round, refs.rank)
        home = world.region("ticket", world.rank, HOME)
        current = word_at(refs.round)
        with peers.when(peers.block() == 0):
            out = Heard(suspicion, wish, heard, words)
            await_partners("returned", world, refs, out, GROUP_THREADS)
            peers.barrier()
            with peers.when(peers.thread() == 0):
                peers.post(home, current)
        # A block that is not there yet keeps nobody waiting: the first one waits for partners only.
        with peers.when((peers.block() != 0) & (peers.thread() == 0)):
            limit_ns = word_at(refs.deadline_ms).wide() * 1_000_000 + GRACE_NS
            epoch, start = word_at(refs.epoch), peers.now_ns()
            peers.wait_for(home, current, start, limit_ns, None, epoch)
        peers.barrier()
        is_partner, _ = partner_test(refs.active, suspicion, world.rank)
        each_part = functools.partial(_sum_part, place, slots, weights, world, is_partner, y)
        sum_part = lambda item: each_part(item, choices, parts)
        peers.each(peers.block(), tokens * parts, blocks, sum_part)

    operands = (slots.reshape(-1), weights.reshape(-1), heap, *told(call, rank), sent)
    found = simt(
        body,
        *operands,
        out={
            "y": ((tokens, layout.hidden), jnp.float32),
            "suspicion": ((place.ranks,), jnp.int32),
            "wish": ((1,), jnp.uint32),
        },
        grid=blocks,
        name="combine",
        shared=(place.ranks, 2),
    )
    return found["y"], found["suspicion"]


def _sum_part(
    place: Place, slots, weights, heap: Heap, is_partner, y, item: Word, choices, parts
) -> None:
    """Part of a kernel: each thread sums CHANNELS channels of a token, choice after choice."""
    layout, per_choice = place.layout, place.layout.combine == "per_choice"
    chunks = layout.hidden // CHANNELS
    token, chunk = item // parts, item % parts * GROUP_THREADS + peers.thread()
    found = [peers.load(entry(slots, token * choices + k)) for k in range(choices)]
    owners = [peers.select(s >= 0, s // place.slots_per_rank, 0) for s in found]
    valid = [(s >= 0) & is_partner(owner) for s, owner in zip(found, owners, strict=True)]
    with peers.when(chunk < chunks):
        offset, total = chunk.wide() * 16, peers.zero_f32x8()
        for k, (owner, good) in enumerate(zip(owners, valid, strict=True)):
            if per_choice:
                at = heap.region("returns", heap.rank, owner, token, k)
                share = peers.load(entry(weights, token * choices + k))
            else:
                # A rank's sum is there once, however many of the choices it ran.
                for earlier, known in zip(owners[:k], valid[:k], strict=True):
                    good = good & ((known & (earlier == owner)) ^ 1)
                at = heap.region("returns", heap.rank, owner, token)
                share = peers.word(ONE)
            total = peers.scaled_add(total, share, peers.load_bf16x8(at + offset), good)
        row = peers.address(y, token.wide() * (layout.hidden * 4))
        peers.store_f32x8(row + chunk.wide() * 32, total)
