"""Combine on a GPU: results straight into their owner's window, summed there in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, UInt8

from pallas_kernels import peers
from pallas_kernels.call import Call
from pallas_kernels.combine.config import CombineConfig
from pallas_kernels.gpu import (
    GROUP_THREADS,
    Place,
    arrive,
    entry,
    open_heap,
    partner_test,
    simt,
    words_of,
)
from pallas_kernels.peers import Word

CHANNELS = 8  # bf16 in one 16-byte access
ONE = 0x3F800000  # float32 1.0 by its bits


def combine_mosaic(
    results: Float[Array, "R T K D"],
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
    sent = send_home(results, received, sent_weights, heap, call, rank, place, config)
    return receive_home(slots, weights, heap, call, rank, sent, place, config)


def send_home(results, received, sent_weights, heap, call: Call, rank, place: Place, config):
    """Writes results into the windows of their tokens' owners; the flags are `receive_home`'s.

    Returns an array that is there once all is written.
    """
    if place.layout.combine == "per_choice":
        return send_choices(results, received, heap, call, rank, place, config)
    return send_sums(results, received, sent_weights, heap, call, rank, place, config)


def receive_home(slots, weights, heap, call: Call, rank, sent, place: Place, config: CombineConfig):
    """Posts, waits and sums: returns y and suspicion. `sent` is the output of `send_home`."""
    suspicion = arrive("returned", place, heap, call, rank, sent)["suspicion"]
    return sum_home(slots, weights, heap, call.after(suspicion), rank, place, config), suspicion


def send_choices(results, received, heap, call: Call, rank, place: Place, config: CombineConfig):
    """One row for each choice, to `returns[rank, t, k]` of its source."""
    layout, (ranks, tokens, choices, hidden) = place.layout, results.shape
    row_bytes, blocks = hidden * 2, min(ranks * tokens, config.send_blocks)

    def body(results, received, active, suspicion, scalars, heap_ref, done):
        heap, thread, block = open_heap(place, heap_ref, scalars), peers.thread(), peers.block()
        is_partner, _ = partner_test(active, suspicion, heap.rank)

        def send_token(row: Word) -> None:
            home, token = row // tokens, row % tokens
            heard = is_partner(home)
            for choice in range(choices):
                pair = row * choices + choice
                mine = peers.load(entry(received, pair)) >= 0
                with peers.when(mine & heard):
                    target = heap.region("returns", home, heap.rank, token, choice)
                    source = peers.address(results, pair.wide() * row_bytes)
                    peers.copy_row(source, [(target, mine)], row_bytes)

        peers.each(block, ranks * tokens, blocks, send_token)
        with peers.when((block == 0) & (thread == 0)):
            peers.store(peers.address(done), peers.word(1))

    operands = (results.astype(layout.row_dtype), received.reshape(-1))
    operands += (call.active, call.suspicion, words_of(call, rank), heap)
    done = {"done": ((1,), jnp.int32)}
    return simt(body, *operands, out=done, grid=blocks, name="combine_send")["done"]


def send_sums(
    results, received, weights, heap, call: Call, rank, place: Place, config: CombineConfig
):
    """One row for each token: this rank's weighted sum over its choices, in the order of k."""
    layout, (ranks, tokens, choices, hidden) = place.layout, results.shape
    row_bytes, chunks = hidden * 2, hidden // CHANNELS
    parts = -(-chunks // GROUP_THREADS)
    blocks = min(ranks * tokens * parts, config.send_blocks)

    def body(results, received, weights, active, suspicion, scalars, heap_ref, done):
        heap, thread, block = open_heap(place, heap_ref, scalars), peers.thread(), peers.block()
        is_partner, _ = partner_test(active, suspicion, heap.rank)

        def send_part(item: Word) -> None:
            row, chunk = item // parts, item % parts * GROUP_THREADS + thread
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

        peers.each(block, ranks * tokens * parts, blocks, send_part)
        with peers.when((block == 0) & (thread == 0)):
            peers.store(peers.address(done), peers.word(1))

    operands = (results.astype(layout.row_dtype), received.reshape(-1), weights.reshape(-1))
    operands += (call.active, call.suspicion, words_of(call, rank), heap)
    done = {"done": ((1,), jnp.int32)}
    return simt(body, *operands, out=done, grid=blocks, name="combine_send")["done"]


def sum_home(slots, weights, heap, call: Call, rank, place: Place, config: CombineConfig):
    """`y[t]` out of the rows that came home. Rows of ranks that were not heard are not read."""
    layout, (tokens, choices) = place.layout, slots.shape
    chunks = layout.hidden // CHANNELS
    parts = -(-chunks // GROUP_THREADS)
    blocks = min(tokens * parts, config.sum_blocks)
    per_choice = layout.combine == "per_choice"

    def body(slots, weights, active, suspicion, scalars, heap_ref, y):
        heap, thread, block = open_heap(place, heap_ref, scalars), peers.thread(), peers.block()
        is_partner, _ = partner_test(active, suspicion, heap.rank)

        def sum_part(item: Word) -> None:
            token, chunk = item // parts, item % parts * GROUP_THREADS + thread
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

        peers.each(block, tokens * parts, blocks, sum_part)

    operands = (slots.reshape(-1), weights.reshape(-1), call.active, call.suspicion)
    shape = {"y": ((tokens, layout.hidden), jnp.float32)}
    return simt(
        body, *operands, words_of(call, rank), heap, out=shape, grid=blocks, name="combine_sum"
    )["y"]
