"""What both exchanges share on a GPU: addresses in the heap, posting and waiting, reading windows.

An exchange is three kernels on one stream. The *send* kernel writes rows into peers' windows. The
*arrive* kernel, one block, starts when those writes are done: it posts the round to every partner
and waits for theirs. What follows reads the own window. Nothing of them is compiled for one
membership: partners, round, deadline and abort word's address are read from arrays at each run.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32, UInt8, UInt32

from pallas_kernels import peers
from pallas_kernels.call import Call
from pallas_kernels.peers import Word
from pallas_kernels.window import DOUBLE_BUFFERED, WindowLayout

# Words that every kernel is given: those of Call.scalars, then the rank.
EPOCH, ROUND, DEADLINE_MS, WISH, ABORT, ABORT_HIGH, RANK = range(7)
GROUP_THREADS = 128  # threads of one warpgroup


@dataclasses.dataclass(frozen=True)
class Place:
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

    place: Place
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


def open_heap(place: Place, heap_ref, scalars_ref) -> Heap:
    half, rank = scalar_at(scalars_ref, ROUND) & 1, scalar_at(scalars_ref, RANK)
    slab_bytes = place.slab_bytes or heap_ref.type.shape[1]
    return Heap(place, peers.address(heap_ref), slab_bytes, half, rank)


def words_of(call: Call, rank) -> UInt32[Array, "7"]:
    """The words that every kernel is given. `rank` is a number, or an int32 scalar."""
    return jnp.concatenate([call.scalars(), jnp.asarray(rank, jnp.uint32)[None]])


def scalar_at(scalars_ref, index: int) -> Word:
    return peers.load(peers.address(scalars_ref, 4 * index))


def entry(reference, index: Word) -> Word:
    """Address of a 32-bit entry of a flat array."""
    return peers.address(reference, index.wide() * 4)


def partners_of(call: Call, rank) -> Int32[Array, "R"]:
    """1 for the ranks this exchange talks to: none, once the step was aborted."""
    heard = (call.active > 0) & (call.suspicion == 0) & (call.suspicion[rank] == 0)
    return heard.astype(jnp.int32)


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


def arrive(
    flag: str, place: Place, heap, call: Call, rank, sent, *, members: "MemberLists | None" = None
) -> dict:
    """Posts the round to every partner, waits for theirs, and reports.

    `sent` is the output of the send kernel: what it wrote is there before any flag is. `flag` names
    the region. Returns `suspicion` int32 [R] and `wish` int32 [1], the largest heard; with
    `members` also `slots` int32 [R T K] (-1 of ranks not heard) and the lists, see MemberLists.

    Nothing off the GPU is touched unless a rank is late: reading the abort word costs microseconds.
    """
    ranks = place.ranks
    out = {"suspicion": ((ranks,), jnp.int32), "wish": ((1,), jnp.int32)}
    if members is not None:
        out |= members.out
    groups = 1 if members is None else members.groups
    threads = GROUP_THREADS * groups
    shared = (ranks, 2) if members is None else (ranks, 2, members.slots)

    def body(heap_ref, scalars, active, before, _, suspicion, loudest_out, *rest):
        *lists, heard, words, counts = rest if members is not None else (*rest, None)
        thread, heap = peers.thread(), open_heap(place, heap_ref, scalars)
        rank, start = heap.rank, peers.now_ns()
        epoch, current = scalar_at(scalars, EPOCH), scalar_at(scalars, ROUND)
        limit_ns = scalar_at(scalars, DEADLINE_MS).wide() * 1_000_000
        low, high = scalar_at(scalars, ABORT), scalar_at(scalars, ABORT_HIGH)
        abort = low.wide() | (high.wide() << 32)
        is_partner, ended = partner_test(active, before, rank)
        loudest, failed = peers.address(words, 0), peers.address(words, 4)

        def hear(peer: Word) -> None:
            peers.store(entry(suspicion, peer), peers.load(entry(before, peer)))
            peers.store(entry(heard, peer), peers.word(0))
            with peers.when(is_partner(peer)):
                at = heap.region(flag, rank, peer)
                came = peers.wait_for(at, current, abort, epoch, start, limit_ns)
                peers.store(entry(heard, peer), came)
                with peers.when(came != 0):
                    wish = peers.look(heap.region("header", rank, peer))
                    peers.max_shared(loudest, wish)
                with peers.when(came == 0):
                    # An aborted wait blames nobody.
                    late = epoch.below(peers.look(abort)) ^ 1
                    peers.store(entry(suspicion, peer), late.narrow())
                    peers.store(failed, peers.word(1))

        with peers.when(thread == 0):
            peers.store(loudest, scalar_at(scalars, WISH))
            peers.store(failed, ended.narrow())
        tell_partners(flag, heap, scalars, is_partner, threads)
        peers.barrier()
        peers.each(thread, ranks, threads, hear)
        peers.barrier()
        with peers.when(thread == 0):
            peers.store(peers.address(loudest_out), peers.load(loudest))
            # After all waits: what ended one of them is seen here too.
            with peers.when(peers.load(failed) != 0):
                aborted = ended | epoch.below(peers.look(abort))
                peers.store(entry(suspicion, rank), aborted.narrow())
        if members is not None:
            members.collect(heap, heard, counts, lists, thread)

    run = simt(
        body,
        heap,
        words_of(call, rank),
        call.active,
        call.suspicion,
        sent,
        out=out,
        grid=1,
        name=f"arrive_{flag}",
        groups=groups,
        shared=shared,
    )
    return run


def partner_test(active, suspicion, rank: Word) -> tuple[Callable[[Word], Word], Word]:
    """Part of a kernel: (whether this exchange talks to a rank, whether the step was aborted)."""
    ended = peers.load(entry(suspicion, rank)) != 0

    def is_partner(peer: Word) -> Word:
        there = peers.load(entry(active, peer)) > 0
        return there & (peers.load(entry(suspicion, peer)) == 0) & (ended ^ 1)

    return is_partner, ended


def tell_partners(flag: str, heap: Heap, scalars, is_partner, threads: int) -> None:
    """Part of a kernel: the wish and then the round into each partner's window."""
    wish, current = scalar_at(scalars, WISH), scalar_at(scalars, ROUND)

    def tell(peer: Word) -> None:
        with peers.when(is_partner(peer)):
            peers.store(heap.region("header", peer, heap.rank), wish)
            peers.post(heap.region(flag, peer, heap.rank), current)

    peers.each(peers.thread(), heap.place.ranks, threads, tell)


def post_round(flag: str, place: Place, heap, call: Call, rank, sent):
    """Only the first half of `arrive`, for ranks that take turns on one GPU.

    There no rank may wait before all have posted; `arrive` posts the same round once more.
    """

    def body(heap_ref, scalars, active, before, sent, done):
        heap = open_heap(place, heap_ref, scalars)
        is_partner, _ = partner_test(active, before, heap.rank)
        tell_partners(flag, heap, scalars, is_partner, GROUP_THREADS)
        with peers.when(peers.thread() == 0):
            peers.store(peers.address(done), peers.word(1))

    operands = (heap, words_of(call, rank), call.active, call.suspicion, sent)
    done = {"done": ((1,), jnp.int32)}
    return simt(body, *operands, out=done, grid=1, name=f"post_{flag}")["done"]


@dataclasses.dataclass(frozen=True)
class MemberLists:
    """Which received choices belong to which slot, gathered by the block that waited for them.

    Outputs of `arrive`, all int32:
        slots    [R T K]     slot on this rank of each received choice, -1: none
        members  [S R*T]     the first counts[s] entries of row s: choices (index into R T K)
        counts   [S]
        tiles    [1 + 2 N]   how many tiles of `tile_rows` members, then slot and first of each
    """

    place: Place
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
    def members_max(self) -> int:
        """Of one slot: a token chooses an expert once at most."""
        return self.place.ranks * self.tokens

    @property
    def tiles_max(self) -> int:
        return self.pairs // self.tile_rows + min(self.slots, self.pairs)

    @property
    def groups(self) -> int:
        """Warpgroups of the block: few choices need few threads."""
        return max(1, min(8, self.pairs // (4 * GROUP_THREADS)))

    @property
    def out(self) -> dict:
        return {
            "slots": ((self.pairs,), jnp.int32),
            "members": ((self.slots * self.members_max,), jnp.int32),
            "counts": ((self.slots,), jnp.int32),
            "tiles": ((1 + 2 * self.tiles_max,), jnp.int32),
        }

    def collect(self, heap: Heap, heard, counts_shared, outs, thread: Word) -> None:
        """Part of a kernel; called by all threads of the block, after `heard` is written."""
        slots_out, members, counts, tiles = outs
        threads, per_source = GROUP_THREADS * self.groups, self.tokens * self.choices
        clear = lambda slot: peers.store(entry(counts_shared, slot), peers.word(0))
        peers.each(thread, self.slots, threads, clear)
        peers.barrier()

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
                    row = slot * self.members_max + place
                    peers.store(entry(members, row), pair + position)

        peers.each(thread, self.pairs // 4, threads, four)
        peers.barrier()

        def list_tiles(slot: Word) -> None:
            in_tiles = lambda s: (
                (peers.load(entry(counts_shared, s)) + (self.tile_rows - 1)) // self.tile_rows
            )
            zero = peers.word(0)
            first = peers.fold(zero, slot, 1, zero, lambda s, total: total + in_tiles(s))
            mine = in_tiles(slot)
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
    name: str, place: Place, heap: UInt8[Array, "N B"], call: Call, rank, after
) -> Array:
    """A copy of a region of the own window, of the half of the call's round, `[R ...]`.

    `after` is an output of what must have run before.
    """
    region = place.layout.regions[name]
    words = math.prod(region.shape[1:]) * region.dtype.itemsize // 4
    blocks = max(1, min(1024, words // (4 * GROUP_THREADS)))

    def body(heap_ref, scalars, _, out):
        heap = open_heap(place, heap_ref, scalars)
        first = peers.block() * GROUP_THREADS + peers.thread()

        def four(index: Word) -> None:
            offset = index.wide() * 16
            values = peers.load_wide(heap.region(name, heap.rank) + offset)
            peers.store_wide(peers.address(out) + offset, values)

        peers.each(first, words // 4, blocks * GROUP_THREADS, four)

    shape = {"copy": ((words,), jnp.uint32)}
    run = simt(body, heap, words_of(call, rank), after, out=shape, grid=blocks, name=f"read_{name}")
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
