"""What both exchanges share on a GPU: addresses in the heap, posting and waiting, reading windows.

A rank's exchange is: write into the partners' windows, post the round to each of them, wait for
theirs, read the own window. *Dispatch* does the first three in one kernel: the block that is the
last to have written posts and waits for all. *Combine* posts when the results are written; the
first block of the kernel that sums them waits, and the others for it. Nothing of them is compiled
for one membership: partners, round, deadline and abort word's address are read from arrays at each
run.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, UInt8

from pallas_kernels import peers
from pallas_kernels.call import Call
from pallas_kernels.peers import Word
from pallas_kernels.window import DOUBLE_BUFFERED, WindowLayout

GROUP_THREADS = 128  # threads of one warpgroup
# Entries of the region `ticket`.
DISPATCH_DONE, COMBINE_DONE, HOME = range(3)
# HOME holds the round whose results have come home; with these bits turned it says that some have
# not, or that it is not known yet. No round near this one looks like that.
INCOMPLETE, NOT_HOME = 1 << 31, 1 << 30
UNROLLED_SLOTS = 64  # up to which a sum over slots is no loop
# Beyond the deadline, for what a block waits for from the block that keeps the deadline.
GRACE_NS = 1_000_000_000


@dataclasses.dataclass(frozen=True)
class ExchangeSpec:
    """What is compiled into the kernels of an exchange. The rank is not: all ranks share them."""

    layout: WindowLayout
    slots_per_rank: int
    slab_bytes: int = 0  # from one slab to the next; 0: the length of the heap's rows

    @property
    def ranks(self) -> int:
        return self.layout.ranks


@dataclasses.dataclass(frozen=True)
class Heap:
    """Addresses in the heap, seen from a kernel. `half` is the parity of the round."""

    place: ExchangeSpec
    base: Word
    slab_bytes: int
    half: Word
    rank: Word  # this one

    def region(self, name: str, rank: Word | int, *index: Word | int) -> Word:
        """Address of an entry of a region of `rank`; double-buffered ones of this round's half.

        Missing trailing indices are zero. Indices are 32-bit Words or numbers.
        """
        region = self.place.layout.regions[name]
        shape, strides = region.shape, _strides(region)
        offset = peers.word(region.offset, 64)
        if name in DOUBLE_BUFFERED:
            offset = offset + self.half.wide() * strides[0]
            shape, strides = shape[1:], strides[1:]
        for entry, stride in zip(index, strides, strict=False):
            offset = offset + (entry.wide() if isinstance(entry, Word) else entry) * stride
        slab = rank.wide() * self.slab_bytes if isinstance(rank, Word) else rank * self.slab_bytes
        return self.base + offset + slab


class ExchangeScalars(typing.NamedTuple):
    """What every kernel of an exchange is told: 32-bit words, each an array of its own.

    So nothing is computed to bring them together; within kernels these are references.
    """

    epoch: Array  # [1]
    round: Array  # [1]
    deadline_ms: Array  # [1]
    vote: Array  # [1]
    abort: Array  # [2]
    rank: Array  # [1]
    active: Array  # [R]
    suspicion: Array  # [R]


def exchange_scalars(call: Call) -> ExchangeScalars:
    one = lambda scalar, dtype=jnp.uint32: jnp.asarray(scalar, dtype).reshape(1)
    return ExchangeScalars(
        epoch=one(call.epoch),
        round=one(call.round),
        deadline_ms=one(call.deadline_ms),
        vote=one(call.vote),
        abort=jnp.asarray(call.abort_address),
        rank=one(call.rank, jnp.int32),
        active=jnp.asarray(call.active),
        suspicion=jnp.asarray(call.suspicion),
    )


def open_heap(place: ExchangeSpec, heap_ref, round_ref, rank_ref) -> Heap:
    half, rank = word_at(round_ref) & 1, word_at(rank_ref)
    slab_bytes = place.slab_bytes or heap_ref.type.shape[1]
    return Heap(place, peers.address(heap_ref), slab_bytes, half, rank)


def word_at(reference, index: int = 0) -> Word:
    return peers.load(peers.address(reference, 4 * index))


def entry(reference, index: Word) -> Word:
    """Address of a 32-bit entry of a flat array."""
    return peers.address(reference, index.wide() * 4)


def simt(
    body: Callable,
    *operands,
    out: dict,
    grid: int,
    name: str,
    groups: int = 1,
    shared: tuple[int, ...] = (),
):
    """Runs `body(*operand refs, *output refs, *shared refs)`, written with `peers`, in each thread.

    `grid` blocks of `groups` warpgroups. `out` are shapes of outputs; `shared` sizes of int32
    arrays in shared memory.
    """
    kinds = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in out.values())

    def kernel(*refs):
        types = (peers.ref,) * len(refs)
        plgpu.inline_mgpu(arg_types=types)(lambda ctx, *inner: body(*inner))(*refs)

    kernel.__name__ = name
    run = plgpu.kernel(
        kernel,
        out_type=kinds,
        grid=(grid,),
        grid_names=("block",),
        scratch_types=[plgpu.SMEM((size,), jnp.int32) for size in shared],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **({"num_threads": groups, "thread_name": "group"} if groups > 1 else {}),
    )
    return dict(zip(out, run(*operands), strict=True))


def partner_test(active, suspicion, rank: Word) -> tuple[Callable[[Word], Word], Word]:
    """Part of a kernel: (whether this exchange talks to a rank, whether the step was aborted).

    It talks to those that are active and not suspected; to nobody once the step was aborted. Whole
    warps call it.
    """
    ranks = active.type.shape[0]
    if ranks <= peers.WARP:
        # All ranks at once, by the lanes of a warp: nothing waits for a rank's number first.
        lane = peers.lane(peers.WARP)
        inside = lane < ranks
        at = peers.select(inside, lane, 0)
        there = inside & (peers.load(entry(active, at)) > 0)
        suspected = peers.which_lanes(peers.load(entry(suspicion, at)) != 0)
        has = lambda ranks, rank: ((ranks >> rank) & 1) != 0
        ended = has(suspected, rank)
        partners = peers.which_lanes(there) & (suspected ^ -1)
        partners = peers.select(ended, peers.word(0), partners)
        return functools.partial(has, partners), ended
    ended = peers.load(entry(suspicion, rank)) != 0

    def is_partner(peer: Word) -> Word:
        there = peers.load(entry(active, peer)) > 0
        return there & (peers.load(entry(suspicion, peer)) == 0) & (ended ^ 1)

    return is_partner, ended


def first_of_each(there, owners, heard) -> list:
    """`heard`, less the choices whose owner is that of an earlier choice that is there.

    Lists over k, of Words or of whatever has their operators: owners `[0 2 0]` of choices that are
    all there and heard give `[1 1 0]`.
    """
    fresh = []
    for k, owner in enumerate(owners):
        found = heard[k]
        for earlier in range(k):
            found = found & ((there[earlier] & (owners[earlier] == owner)) ^ 1)
        fresh.append(found)
    return fresh


def is_last_block(heap: Heap, ticket: int, blocks: int, shared) -> Word:
    """Part of a kernel, called by all threads of every block: whether all others got here before.

    Then all that they wrote before is announced by what this block posts.
    """
    seen = peers.address(shared)
    peers.barrier()
    with peers.when(peers.thread() == 0):
        at = heap.region("ticket", heap.rank, ticket)
        peers.store(seen, peers.count_up(at, blocks - 1))
    peers.barrier()
    return peers.load(seen) == blocks - 1


def forget_home(heap: Heap, refs: ExchangeScalars) -> None:
    """Part of a kernel: no block of this exchange's last kernel begins to sum before it is told.

    A round that is run again, by a rank that is alone, would find its own word of the time before.
    """
    with peers.when(peers.thread() == 0):
        at = heap.region("ticket", heap.rank, HOME)
        peers.store(at, word_at(refs.round) ^ NOT_HOME)


def tell_partners(
    flag: str, heap: Heap, refs: ExchangeScalars, is_partner, threads: int, stand_in: bool = False
) -> None:
    """Part of a kernel: the vote and then the round into each partner's window.

    With `stand_in` also into the own window what the partners would write there.
    """
    vote, current = word_at(refs.vote), word_at(refs.round)

    def tell(peer: Word) -> None:
        with peers.when(is_partner(peer)):
            for to, by in ((peer, heap.rank), (heap.rank, peer))[: 2 if stand_in else 1]:
                peers.store(heap.region("votes", to, by), vote)
                peers.post(heap.region(flag, to, by), current)

    peers.each(peers.thread(), heap.place.ranks, threads, tell)


class ArrivalFlags(typing.NamedTuple):
    """Part of a kernel: what a block that waits for the partners writes, by reference."""

    suspicion: Array  # int32 [R], an output
    heard: Array  # int32 [R] in shared memory: 1 where the flag came
    failed: Array  # int32 [1] in shared memory: 1 where one did not


def await_partners(
    flag: str,
    heap: Heap,
    refs: ExchangeScalars,
    out: ArrivalFlags,
    threads: int,
    stand_in: bool = False,
) -> None:
    """Part of a kernel, called by all threads of one block: posts the round, waits for the others'.

    Nothing off the GPU is touched unless a rank is late: reading the abort word costs microseconds.
    """
    thread, ranks, rank = peers.thread(), heap.place.ranks, heap.rank
    start = peers.now_ns()
    epoch, current = word_at(refs.epoch), word_at(refs.round)
    limit_ns = word_at(refs.deadline_ms).wide() * 1_000_000
    abort = word_at(refs.abort).wide() | (word_at(refs.abort, 1).wide() << 32)
    is_partner, ended = partner_test(refs.active, refs.suspicion, rank)
    failed = peers.address(out.failed)

    def hear(peer: Word) -> None:
        peers.store(entry(out.suspicion, peer), peers.load(entry(refs.suspicion, peer)))
        peers.store(entry(out.heard, peer), peers.word(0))
        with peers.when(is_partner(peer)):
            at = heap.region(flag, rank, peer)
            came = peers.wait_for(at, current, start, limit_ns, abort, epoch)
            peers.store(entry(out.heard, peer), came)
            with peers.when(came == 0):
                # An aborted wait blames nobody.
                late = epoch.below(peers.look(abort)) ^ 1
                peers.store(entry(out.suspicion, peer), late.narrow())
                peers.store(failed, peers.word(1))

    with peers.when(thread == 0):
        peers.store(failed, ended.narrow())
    tell_partners(flag, heap, refs, is_partner, threads, stand_in)
    peers.barrier()
    peers.each(thread, ranks, threads, hear)
    peers.barrier()
    # After all waits: what ended one of them is seen here too.
    with peers.when((thread == 0) & (peers.load(failed) != 0)):
        aborted = ended | epoch.below(peers.look(abort))
        peers.store(entry(out.suspicion, rank), aborted.narrow())


def gather_votes(
    heap: Heap,
    refs: ExchangeScalars,
    heard,
    largest,
    vote,
    threads: int,
    meanwhile: Callable[[], None],
) -> None:
    """Part of a kernel, after `await_partners`: the largest vote of those heard and of this rank.

    `largest` is an int32 [1] in shared memory, `vote` the output. While the votes are under way
    `meanwhile` is done, in which all threads meet at least once.
    """
    thread, ranks, at = peers.thread(), heap.place.ranks, peers.address(largest)
    with peers.when(thread == 0):
        peers.store(at, word_at(refs.vote))
    votes = []
    for first in range(0, ranks, threads):
        inside = thread + first < ranks
        peer = peers.select(inside, thread + first, 0)
        came = inside & (peers.load(entry(heard, peer)) != 0)
        votes.append((came, peers.load_if(came, heap.region("votes", heap.rank, peer))))
    meanwhile()
    for came, found in votes:
        with peers.when(came):
            peers.max_shared(at, found)
    peers.barrier()
    with peers.when(thread == 0):
        peers.store(peers.address(vote), peers.load(at))


@dataclasses.dataclass(frozen=True)
class RowLists:
    """Which received choices belong to which slot, gathered by the block that waited for them.

    Outputs of dispatch, all int32:
        slots    [R T K]     slot on this rank of each received choice, -1: none
        grouped  [S R*T]     the first counts[s] entries of row s: choices (index into R T K)
        counts   [S]
        tiles    [1 + 2 N]   how many tiles of `tile_rows` rows, then slot and first of each
    """

    place: ExchangeSpec
    tokens: int
    choices: int
    tile_rows: int

    @property
    def slots(self) -> int:
        return self.place.slots_per_rank

    @property
    def pairs(self) -> int:
        return self.place.ranks * self.tokens * self.choices

    @property
    def rows_max(self) -> int:
        """Of one slot: a token chooses an expert once at most."""
        return self.place.ranks * self.tokens

    @property
    def tiles_max(self) -> int:
        return self.pairs // self.tile_rows + min(self.slots, self.pairs)

    @property
    def groups(self) -> int:
        """Warpgroups of a block, a power of two: few choices need few threads."""
        wanted = self.pairs // (4 * GROUP_THREADS)
        return max(groups for groups in (1, 2, 4, 8) if groups <= max(1, wanted))

    @property
    def out(self) -> dict:
        return {
            "slots": ((self.pairs,), jnp.int32),
            "grouped": ((self.slots * self.rows_max,), jnp.int32),
            "counts": ((self.slots,), jnp.int32),
            "tiles": ((1 + 2 * self.tiles_max,), jnp.int32),
        }

    def clear(self, counts_shared, threads: int) -> None:
        """Part of a kernel: what `collect` counts in is zero, after the next barrier."""
        zero = lambda slot: peers.store(entry(counts_shared, slot), peers.word(0))
        peers.each(peers.thread(), self.slots, threads, zero)

    def collect(self, heap: Heap, heard, counts_shared, outs, threads: int) -> None:
        """Part of a kernel; called by all threads of the block, after `heard` is written."""
        slots_out, grouped, counts, tiles = outs
        thread, per_source = peers.thread(), self.tokens * self.choices

        def four(index: Word) -> None:
            pair = index * 4
            source = pair // per_source
            came = peers.load(entry(heard, source)) != 0
            inside = pair % per_source
            start = heap.region("slots", heap.rank, source) + inside.wide() * 4
            found = peers.load_words(start, 4)
            found = [peers.select(came, slot, peers.word(-1)) for slot in found]
            peers.store_words(entry(slots_out, pair), found)
            for position, slot in enumerate(found):
                # Unsigned: -1 is none, and what a window may hold by mistake is no slot either.
                with peers.when(slot.below(self.slots)):
                    place = peers.add_shared(entry(counts_shared, slot), 1)
                    row = slot * self.rows_max + place
                    peers.store(entry(grouped, row), pair + position)

        peers.each(thread, self.pairs // 4, threads, four)
        peers.barrier()

        def in_tiles(slot: Word) -> Word:
            count = peers.load(entry(counts_shared, slot))
            return (count + (self.tile_rows - 1)) // self.tile_rows

        def before(slot: Word) -> Word:
            """Tiles of all lower slots."""
            zero = peers.word(0)
            if self.slots > UNROLLED_SLOTS:
                return peers.fold(zero, slot, 1, zero, lambda s, total: total + in_tiles(s))
            total = zero
            for lower in map(peers.word, range(self.slots - 1)):
                total = total + peers.select(lower < slot, in_tiles(lower), 0)
            return total

        def list_tiles(slot: Word) -> None:
            first, mine, zero = before(slot), in_tiles(slot), peers.word(0)
            peers.store(entry(counts, slot), peers.load(entry(counts_shared, slot)))

            def one(tile: Word) -> None:
                at = (first + tile) * 2 + 1
                peers.store(entry(tiles, at), slot)
                peers.store(entry(tiles, at + 1), tile * self.tile_rows)

            peers.each(zero, mine, 1, one)
            with peers.when(slot == self.slots - 1):
                peers.store(entry(tiles, zero), first + mine)

        peers.each(thread, self.slots, threads, list_tiles)


def read_region(
    name: str, place: ExchangeSpec, heap: UInt8[Array, "N B"], call: Call, after
) -> Array:
    """A copy of a region of the own window, of the half of the call's round, `[R ...]`.

    `after` is an output of what must have run before.
    """
    region = place.layout.regions[name]
    words = math.prod(region.shape[1:]) * region.dtype.itemsize // 4
    blocks = max(1, min(1024, words // (4 * GROUP_THREADS)))

    def body(heap_ref, current, number, _, out):
        heap = open_heap(place, heap_ref, current, number)
        first = peers.block() * GROUP_THREADS + peers.thread()

        def four(index: Word) -> None:
            offset = index.wide() * 16
            values = peers.load_wide(heap.region(name, heap.rank) + offset)
            peers.store_wide(peers.address(out) + offset, values)

        peers.each(first, words // 4, blocks * GROUP_THREADS, four)

    shape = {"copy": ((words,), jnp.uint32)}
    refs = exchange_scalars(call)
    operands = (heap, refs.round, refs.rank, after)
    run = simt(body, *operands, out=shape, grid=blocks, name=f"read_{name}")
    kept = jax.lax.bitcast_convert_type(
        run["copy"].reshape(-1, 1) if region.dtype.itemsize == 4 else run["copy"],
        jnp.dtype(region.dtype),
    )
    return kept.reshape(region.shape[1:])


def _strides(region) -> list[int]:
    """Bytes between neighbours along each axis."""
    strides, size = [], region.dtype.itemsize
    for length in reversed(region.shape):
        strides.append(size)
        size *= length
    return strides[::-1]
