"""Parts of kernels that dispatch and combine share on a GPU: addresses, flags, waits, copies.

A rank's exchange: write into the partners' windows, post the round to each of them, wait for their
rounds, read the own window. *Dispatch* does the first three in one kernel: the block that finishes
writing last posts and waits. *Combine* posts once the results are written; the first block of the
kernel that sums them waits for the partners, the others wait for that block.

Partners, round, deadline and the abort word's address are operands, so no membership is compiled.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, UInt8, UInt32

from pallas_kernels import simt
from pallas_kernels.exchange.call import Call, ExchangeSpec
from pallas_kernels.simt import GROUP_THREADS, Ref, Word, entry, word_at
from pallas_kernels.window import DOUBLE_BUFFERED, Region

# Entries of the region `ticket`.
DISPATCH_DONE, COMBINE_DONE, HOME = range(3)
# HOME holds the round whose results have all come home. With INCOMPLETE flipped some are missing;
# with NOT_HOME flipped it is not known yet. No round near this one has these bit patterns.
INCOMPLETE, NOT_HOME = 1 << 31, 1 << 30
# Beyond the deadline, for blocks that wait for the block that keeps the deadline.
GRACE_NS = 1_000_000_000

IsPartner = Callable[[Word], Word]


@dataclasses.dataclass(frozen=True)
class Heap:
    """Addresses in the heap, in a kernel. `half` is the parity of the round."""

    spec: ExchangeSpec
    base: Word
    slab_bytes: int
    half: Word
    rank: Word  # the calling rank

    def region(self, name: str, rank: Word | int, *index: Word | int) -> Word:
        """Address of an entry in a region of `rank`, in this round's half if double-buffered.

        Missing trailing indices are zero. Indices are 32-bit Words or numbers.
        """
        region = self.spec.layout.regions[name]
        shape, strides = region.shape, _strides(region)
        offset = simt.word(region.offset, 64)
        if name in DOUBLE_BUFFERED:
            offset = offset + self.half.wide() * strides[0]
            shape, strides = shape[1:], strides[1:]
        for place, stride in zip(index, strides, strict=False):
            offset = offset + (place.wide() if isinstance(place, Word) else place) * stride
        slab = rank.wide() * self.slab_bytes if isinstance(rank, Word) else rank * self.slab_bytes
        return self.base + offset + slab


class ExchangeScalars(typing.NamedTuple):
    """The Call as operands of a kernel; within kernels these are references.

    Kept as separate arrays so that XLA inserts no concatenation.
    """

    epoch: UInt32[Array, "1"]
    round: UInt32[Array, "1"]
    deadline_ms: UInt32[Array, "1"]
    vote: UInt32[Array, "1"]
    abort: UInt32[Array, "2"]
    rank: Int32[Array, "1"]
    active: Int32[Array, "R"]
    suspicion: Int32[Array, "R"]

    @classmethod
    def split(cls, refs: Sequence) -> tuple["ExchangeScalars", Sequence]:
        """The scalars that a kernel's remaining references begin with, and those after them."""
        count = len(cls._fields)
        return cls(*refs[:count]), refs[count:]


def exchange_scalars(call: Call) -> ExchangeScalars:
    """The operands for a call."""
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


def open_heap(spec: ExchangeSpec, heap: Ref, current: Ref, rank: Ref) -> Heap:
    """Part of a kernel: the heap, of references to it, the round and the rank."""
    half, rank = word_at(current) & 1, word_at(rank)
    slab_bytes = spec.slab_bytes or heap.type.shape[1]
    return Heap(spec, simt.address(heap), slab_bytes, half, rank)


class ArrivalFlags(typing.NamedTuple):
    """References that the block which waits for the partners writes."""

    suspicion: Int32[Array, "R"]  # an output
    arrived: Int32[Array, "R"]  # shared memory: 1 if the flag came
    failed: Int32[Array, "1"]  # shared memory: 1 if a flag did not come


@dataclasses.dataclass(frozen=True)
class Turn:
    """One use of the windows, in a kernel whose blocks have `threads` threads.

    Args:
        flag: region of the flags, "sent" or "returned".
        stand_in: also post the flags that the partners would post; for measuring one rank of a
            loopback alone.
    """

    flag: str
    heap: Heap
    refs: ExchangeScalars
    threads: int
    stand_in: bool = False

    @classmethod
    def open(
        cls,
        flag: str,
        spec: ExchangeSpec,
        heap: Ref,
        refs: ExchangeScalars,
        threads: int,
        **options,
    ) -> "Turn":
        """Part of a kernel: of a reference to the heap and the call's references."""
        return cls(flag, open_heap(spec, heap, refs.round, refs.rank), refs, threads, **options)

    def partners(self) -> tuple[IsPartner, Word]:
        """Part of a kernel, called by whole warps: (test of a rank, whether the step was aborted).

        Partners are the ranks that are active and not suspected; none once the step was aborted.
        """
        active, suspicion = self.refs.active, self.refs.suspicion
        ranks = active.type.shape[0]
        if ranks <= simt.WARP:
            # Lane r loads the entries of rank r: no load waits for a rank's number.
            lane = simt.lane(simt.WARP)
            inside = lane < ranks
            at = simt.select(inside, lane, 0)
            there = inside & (simt.load(entry(active, at)) > 0)
            suspected = simt.ballot(simt.load(entry(suspicion, at)) != 0)
            has = lambda ranks, rank: ((ranks >> rank) & 1) != 0
            ended = has(suspected, self.heap.rank)
            partners = simt.ballot(there) & (suspected ^ -1)
            partners = simt.select(ended, simt.word(0), partners)
            return functools.partial(has, partners), ended
        ended = simt.load(entry(suspicion, self.heap.rank)) != 0

        def is_partner(peer: Word) -> Word:
            there = simt.load(entry(active, peer)) > 0
            return there & (simt.load(entry(suspicion, peer)) == 0) & (ended ^ 1)

        return is_partner, ended

    def is_last_block(self, ticket: int, blocks: int, shared: Ref) -> Word:
        """Part of a kernel, called by all threads of all blocks: whether this block came last.

        The writes of all blocks before this call are covered by what the last block posts: each
        block's barrier orders them before its increment, and the increment is acq_rel.
        """
        seen = simt.address(shared)
        simt.barrier()  # Arrive: all threads of the block. After: their writes are ordered before.
        with simt.when(simt.thread() == 0):
            at = self.heap.region("ticket", self.heap.rank, ticket)
            simt.store(seen, simt.count_up(at, blocks - 1))
        simt.barrier()  # After: all threads can read `seen`.
        return simt.load(seen) == blocks - 1

    def clear_home(self) -> None:
        """Part of a kernel: marks this round's results as not home, before combine's last kernel.

        A rank that runs a round again, alone, would otherwise find the word of the first run.
        """
        with simt.when(simt.thread() == 0):
            at = self.heap.region("ticket", self.heap.rank, HOME)
            simt.store(at, word_at(self.refs.round) ^ NOT_HOME)

    @simt.phase("post")
    def post_to_partners(self, is_partner: IsPartner) -> None:
        """Part of a kernel: writes the vote, then posts the round, into each partner's window."""
        heap, vote, current = self.heap, word_at(self.refs.vote), word_at(self.refs.round)

        def post_to(peer: Word) -> None:
            with simt.when(is_partner(peer)):
                ways = ((peer, heap.rank), (heap.rank, peer))
                for to, by in ways[: 2 if self.stand_in else 1]:
                    simt.store(heap.region("votes", to, by), vote)
                    simt.post(heap.region(self.flag, to, by), current)

        simt.each(simt.thread(), heap.spec.ranks, self.threads, post_to)

    @simt.phase("wait")
    def await_partners(self, out: ArrivalFlags) -> None:
        """Part of a kernel, called by all threads of one block: posts the round, awaits theirs.

        After: rows of rank r may be read if `arrived[r]` is 1. The abort word, in host memory, is
        read only if a rank is late: a read costs microseconds.
        """
        thread, heap, refs = simt.thread(), self.heap, self.refs
        start = simt.now_ns()
        epoch, current = word_at(refs.epoch), word_at(refs.round)
        limit_ns = word_at(refs.deadline_ms).wide() * 1_000_000
        abort = word_at(refs.abort).wide() | (word_at(refs.abort, 1).wide() << 32)
        is_partner, ended = self.partners()
        failed = simt.address(out.failed)

        def await_flag(peer: Word) -> None:
            simt.store(entry(out.suspicion, peer), simt.load(entry(refs.suspicion, peer)))
            simt.store(entry(out.arrived, peer), simt.word(0))
            with simt.when(is_partner(peer)):
                at = heap.region(self.flag, heap.rank, peer)
                came = simt.wait_for(at, current, start, limit_ns, abort, epoch)
                simt.store(entry(out.arrived, peer), came)
                with simt.when(came == 0):
                    # An aborted wait suspects no rank.
                    late = epoch.below(simt.load_relaxed(abort)) ^ 1
                    simt.store(entry(out.suspicion, peer), late.narrow())
                    simt.store(failed, simt.word(1))

        with simt.when(thread == 0):
            simt.store(failed, ended.narrow())
        self.post_to_partners(is_partner)
        simt.barrier()  # After: all flags are posted, and `failed` is initialised.
        simt.each(thread, heap.spec.ranks, self.threads, await_flag)
        simt.barrier()  # After: `arrived` and `failed` are final, and each thread has acquired all.
        # Read again after all waits: an abort that ended one of them is visible here too.
        with simt.when((thread == 0) & (simt.load(failed) != 0)):
            aborted = ended | epoch.below(simt.load_relaxed(abort))
            simt.store(entry(out.suspicion, heap.rank), aborted.narrow())

    @simt.phase("vote")
    def gather_votes(
        self, arrived: Ref, largest: Ref, vote: Ref, meanwhile: Callable[[], None]
    ) -> None:
        """Part of a kernel, after `await_partners`: the largest vote of all ranks that came.

        `meanwhile` runs while the votes are loaded; all threads must pass a barrier in it.

        Args:
            arrived: of ArrivalFlags.
            largest: int32 [1] in shared memory.
            vote: the output.
            meanwhile: emits the code between the loads and their use.
        """
        thread, ranks, at = simt.thread(), self.heap.spec.ranks, simt.address(largest)
        with simt.when(thread == 0):
            simt.store(at, word_at(self.refs.vote))
        votes = []
        for first in range(0, ranks, self.threads):
            inside = thread + first < ranks
            peer = simt.select(inside, thread + first, 0)
            came = inside & (simt.load(entry(arrived, peer)) != 0)
            votes.append(
                (came, simt.load_if(came, self.heap.region("votes", self.heap.rank, peer)))
            )
        meanwhile()  # After its barrier: `largest` holds this rank's vote.
        for came, found in votes:
            with simt.when(came):
                simt.max_shared(at, found)
        simt.barrier()  # After: `largest` is final.
        with simt.when(thread == 0):
            simt.store(simt.address(vote), simt.load(at))


def first_of_each(there: Sequence, owners: Sequence, arrived: Sequence) -> list:
    """`arrived` without the choices whose owner already owns an earlier choice that is there.

    Lists over k, of Words or of anything with their operators: owners `[0 2 0]` of choices that are
    all there, with arrived `[1 1 1]`, give `[1 1 0]`.
    """
    fresh = []
    for k, owner in enumerate(owners):
        found = arrived[k]
        for earlier in range(k):
            found = found & ((there[earlier] & (owners[earlier] == owner)) ^ 1)
        fresh.append(found)
    return fresh


def read_region(
    name: str, spec: ExchangeSpec, heap: UInt8[Array, "N B"], call: Call, after: Array
) -> Array:
    """Copy `[R ...]` of a region of the own window, from the half of the call's round.

    `after` is an output of the kernel that must have run before.
    """
    region = spec.layout.regions[name]
    words = math.prod(region.shape[1:]) * region.dtype.itemsize // 4
    blocks = max(1, min(1024, words // (4 * GROUP_THREADS)))

    def body(heap_ref: Ref, current: Ref, number: Ref, _, out: Ref) -> None:
        heap = open_heap(spec, heap_ref, current, number)
        first = simt.block() * GROUP_THREADS + simt.thread()

        def four(index: Word) -> None:
            offset = index.wide() * 16
            values = simt.load_wide(heap.region(name, heap.rank) + offset)
            simt.store_wide(simt.address(out) + offset, values)

        simt.each(first, words // 4, blocks * GROUP_THREADS, four)

    shape = {"copy": ((words,), jnp.uint32)}
    refs = exchange_scalars(call)
    operands = (heap, refs.round, refs.rank, after)
    run = simt.kernel(body, *operands, out=shape, grid=blocks, name=f"read_{name}")
    kept = jax.lax.bitcast_convert_type(
        run["copy"].reshape(-1, 1) if region.dtype.itemsize == 4 else run["copy"],
        jnp.dtype(region.dtype),
    )
    return kept.reshape(region.shape[1:])


def _strides(region: Region) -> list[int]:
    """Bytes between adjacent entries along each axis."""
    strides, size = [], region.dtype.itemsize
    for length in reversed(region.shape):
        strides.append(size)
        size *= length
    return strides[::-1]
