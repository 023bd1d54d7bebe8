"""Loads, stores and waits of single GPU threads: what Pallas' warpgroup arrays cannot say.

Exchanges move rows between memories whose addresses are known only when the kernel runs, and wait
for words that other processes write. Both need per-thread code, so this file writes MLIR by hand
inside `plgpu.inline_mgpu`. It is the only file with inline PTX, and the only one that imports
JAX-internal modules: the MLIR builders that `jax.experimental.mosaic.gpu` itself is written with
have no public name.

A `Word` is an integer of one thread. Addresses are 64-bit Words.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, scf
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

VECTOR_BYTES = 16  # the widest access of one thread
CHUNKS_UNDER_WAY = 8  # of a row, for each thread that copies it
WARP = 32  # threads
ABORT_POLL_ROUNDS = 64  # looks at a flag between two at the abort word, which is off the GPU

ref = plgpu.RefType()
scalar = plgpu.Layout.WG_SPLAT


@dataclasses.dataclass(frozen=True, eq=False)
class Word:
    """An integer of one thread, 32 or 64 bits, two's complement, with Python's operators.

    Comparisons are signed, except `below`, and give a one-bit Word for `when`. `//`, `%` and `>>`
    are meant for values that are not negative.
    """

    value: ir.Value

    @property
    def bits(self) -> int:
        return ir.IntegerType(self.value.type).width

    def _other(self, other) -> ir.Value:
        if isinstance(other, Word):
            if other.bits != self.bits:
                raise TypeError(f"a {self.bits}-bit and a {other.bits}-bit Word; use wide() first")
            return other.value
        return mgpu.c(int(other), self.value.type)

    def _with(self, operation, other) -> "Word":
        return Word(operation(self.value, self._other(other)))

    def _compare(self, predicate, other) -> "Word":
        return Word(arith.cmpi(predicate, self.value, self._other(other)))

    def __add__(self, other):
        return self._with(arith.addi, other)

    def __sub__(self, other):
        return self._with(arith.subi, other)

    def __mul__(self, other):
        return self._with(arith.muli, other)

    def __floordiv__(self, other):
        return self._with(arith.divui, other)

    def __mod__(self, other):
        return self._with(arith.remui, other)

    def __and__(self, other):
        return self._with(arith.andi, other)

    def __or__(self, other):
        return self._with(arith.ori, other)

    def __xor__(self, other):
        return self._with(arith.xori, other)

    def __lshift__(self, other):
        return self._with(arith.shli, other)

    def __rshift__(self, other):
        return self._with(arith.shrui, other)

    def __eq__(self, other):
        return self._compare(arith.CmpIPredicate.eq, other)

    def __ne__(self, other):
        return self._compare(arith.CmpIPredicate.ne, other)

    def __lt__(self, other):
        return self._compare(arith.CmpIPredicate.slt, other)

    def __gt__(self, other):
        return self._compare(arith.CmpIPredicate.sgt, other)

    def __ge__(self, other):
        return self._compare(arith.CmpIPredicate.sge, other)

    def below(self, other) -> "Word":
        """Unsigned `<`."""
        return self._compare(arith.CmpIPredicate.ult, other)

    def wide(self) -> "Word":
        """The same number in 64 bits; it must not be negative."""
        return self if self.bits == 64 else Word(arith.extui(_i64(), self.value))

    def narrow(self) -> "Word":
        """The low 32 bits; of a comparison 0 or 1."""
        if self.bits > 32:
            return Word(arith.trunci(_i32(), self.value))
        return self if self.bits == 32 else Word(arith.extui(_i32(), self.value))

    __hash__ = None


def _i32():
    return ir.IntegerType.get_signless(32)


def _i64():
    return ir.IntegerType.get_signless(64)


def word(number: int, bits: int = 32) -> Word:
    """A constant."""
    return Word(mgpu.c(number, ir.IntegerType.get_signless(bits)))


def select(condition: Word, yes, no) -> Word:
    """`yes` where the condition holds, else `no`."""
    like = yes if isinstance(yes, Word) else no
    as_value = lambda v: v.value if isinstance(v, Word) else mgpu.c(v, like.value.type)
    return Word(arith.select(condition.value, as_value(yes), as_value(no)))


def splat(array) -> Word:
    """The Word of a scalar that was passed with the layout `scalar`."""
    return Word(array.registers.flat[0])


def thread() -> Word:
    """Index of this thread in its block."""
    return Word(mgpu.thread_idx())


def lane(threads: int = 128) -> Word:
    """Index of this thread within its group of `threads`."""
    return thread() & (threads - 1)


@contextlib.contextmanager
def when(condition: Word):
    """The threads for which the condition holds run the block."""
    branch = scf.IfOp(condition.value)
    with ir.InsertionPoint(branch.then_block):
        yield
        scf.yield_([])


def each(start: Word, stop, step, body: Callable[[Word], None]) -> None:
    """`for i in range(start, stop, step): body(i)`; all 32-bit and of this thread."""
    bound = start._other(stop)
    loop = scf.ForOp(start.value, bound, start._other(step), [])
    with ir.InsertionPoint(loop.body):
        body(Word(loop.induction_variable))
        scf.yield_([])


def which_lanes(condition: Word) -> Word:
    """A word with bit i set where the condition holds in lane i of this warp; all 32 call it."""
    ptx = "{ .reg .pred p; setp.ne.u32 p, $1, 0; vote.sync.ballot.b32 $0, p, -1; }"
    held = condition.narrow().value
    return Word(
        mgpu.inline_ptx(ptx, held, result_types=_i32(), has_side_effects=True, convergent=True)
    )


def fold(start: Word, stop, step, initial: Word, body: Callable[[Word, Word], Word]) -> Word:
    """A loop that carries one Word."""
    loop = scf.ForOp(start.value, start._other(stop), start._other(step), [initial.value])
    with ir.InsertionPoint(loop.body):
        result = body(Word(loop.induction_variable), Word(loop.inner_iter_args[0]))
        scf.yield_([result.value])
    return Word(loop.results[0])


def block() -> Word:
    """Index of this thread's block in the grid."""
    return Word(mgpu.block_idx())


def barrier() -> None:
    """All threads of the block meet here; what they wrote before is seen by all after it."""
    mgpu.inline_ptx("bar.sync 0;", result_types=None, convergent=True)


def address(reference, offset: Word | int = 0) -> Word:
    """Address of a byte of an array in GPU memory, or in shared memory (32 bits)."""
    pointer = mgpu.memref_ptr(reference)
    shared = llvm.PointerType(pointer.type).address_space == 3
    start = Word(llvm.ptrtoint(_i32() if shared else _i64(), pointer))
    if isinstance(offset, Word):
        offset = offset.narrow() if shared else offset.wide()
    return start + offset


def _pointer(at: Word) -> ir.Value:
    return llvm.inttoptr(llvm.PointerType.get(3 if at.bits == 32 else 1), at.value)


def load(at: Word) -> Word:
    """A 32-bit word."""
    return Word(llvm.load(_i32(), _pointer(at), alignment=4))


def load_if(wanted: Word, at: Word) -> Word:
    """A 32-bit word where wanted; else 0, and memory is not touched."""
    branch = scf.IfOp(wanted.value, [_i32()], has_else=True)
    with ir.InsertionPoint(branch.then_block):
        scf.yield_([load(at).value])
    with ir.InsertionPoint(branch.else_block):
        scf.yield_([mgpu.c(0, _i32())])
    return Word(branch.results[0])


def store(at: Word, value: Word) -> None:
    """A 32-bit word."""
    llvm.store(value.value, _pointer(at), alignment=4)


def load_words(at: Word, count: int) -> list[Word]:
    """`count` (2 or 4) neighbouring words in one access; `at` is aligned to all of them."""
    kind = ir.VectorType.get((count,), _i32())
    loaded = llvm.load(kind, _pointer(at), alignment=4 * count)
    return [Word(llvm.extractelement(loaded, mgpu.c(i, _i32()))) for i in range(count)]


def store_words(at: Word, words: Sequence[Word]) -> None:
    """2 or 4 neighbouring words in one access."""
    vector = llvm.mlir_undef(ir.VectorType.get((len(words),), _i32()))
    for index, value in enumerate(words):
        vector = llvm.insertelement(vector, value.value, mgpu.c(index, _i32()))
    llvm.store(vector, _pointer(at), alignment=4 * len(words))


def load_wide(at: Word) -> ir.Value:
    """16 bytes as they are, for `store_wide`."""
    return llvm.load(ir.VectorType.get((4,), _i32()), _pointer(at), alignment=VECTOR_BYTES)


def store_wide(at: Word, value: ir.Value) -> None:
    llvm.store(value, _pointer(at), alignment=VECTOR_BYTES)


def add_shared(at: Word, amount: int) -> Word:
    """Adds to a word in shared memory; returns what it was."""
    return Word(
        mgpu.inline_ptx(
            "atom.shared.add.u32 $0, [$1], $2;",
            at.value,
            mgpu.c(amount, _i32()),
            result_types=_i32(),
            has_side_effects=True,
        )
    )


def count_up(at: Word, last: int) -> Word:
    """Adds one to a word in this GPU's memory and returns what it was; after `last` comes 0.

    Who sees a number also sees all that was written before those that counted below it.
    """
    return Word(
        mgpu.inline_ptx(
            "atom.acq_rel.gpu.global.inc.u32 $0, [$1], $2;",
            at.value,
            mgpu.c(last, _i32()),
            result_types=_i32(),
            has_side_effects=True,
        )
    )


def max_shared(at: Word, value: Word) -> None:
    """Raises a word in shared memory to `value`, unsigned."""
    ptx = "red.shared.max.u32 [$0], $1;"
    mgpu.inline_ptx(ptx, at.value, value.value, result_types=None)


# Eight bfloat16 in 16 bytes, as eight float32.


def _vector8(element) -> ir.VectorType:
    return ir.VectorType.get((8,), element)


def load_bf16x8(at: Word) -> ir.Value:
    """Eight bf16 as a vector of eight float32."""
    loaded = llvm.load(_vector8(ir.BF16Type.get()), _pointer(at), alignment=VECTOR_BYTES)
    return arith.extf(_vector8(ir.F32Type.get()), loaded)


def load_bf16x8_if(wanted: Word, at: Word) -> ir.Value:
    """As `load_bf16x8` where wanted; else zeros, and memory is not touched.

    No branch: neighbouring loads are under way together.
    """
    words = mgpu.inline_ptx(
        "{ .reg .pred p; setp.ne.u32 p, $5, 0; mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; "
        "mov.u32 $3, 0; @p ld.global.v4.u32 {$0, $1, $2, $3}, [$4]; }",
        at.value,
        wanted.narrow().value,
        result_types=(_i32(),) * 4,
        has_side_effects=True,
    )
    vector = llvm.mlir_undef(ir.VectorType.get((4,), _i32()))
    for index, value in enumerate(words):
        vector = llvm.insertelement(vector, value, mgpu.c(index, _i32()))
    narrow = llvm.bitcast(_vector8(ir.BF16Type.get()), vector)
    return arith.extf(_vector8(ir.F32Type.get()), narrow)


def update_if(
    wanted: Word, values: Sequence[ir.Value], update: Callable[[], Sequence[ir.Value]]
) -> list[ir.Value]:
    """`update()` where wanted, else `values`. A branch: memory is read only where it is taken."""
    branch = scf.IfOp(wanted.value, [value.type for value in values], has_else=True)
    with ir.InsertionPoint(branch.then_block):
        scf.yield_(list(update()))
    with ir.InsertionPoint(branch.else_block):
        scf.yield_(list(values))
    return list(branch.results)


def store_bf16x8(at: Word, values: ir.Value) -> None:
    """Rounds eight float32 to bf16."""
    narrow = arith.truncf(_vector8(ir.BF16Type.get()), values)
    llvm.store(narrow, _pointer(at), alignment=VECTOR_BYTES)


def store_f32x8(at: Word, values: ir.Value) -> None:
    """Eight float32, 32 bytes."""
    for half in range(2):
        kept = mgpu.vector_slice(values, slice(4 * half, 4 * half + 4))
        llvm.store(kept, _pointer(at + VECTOR_BYTES * half), alignment=VECTOR_BYTES)


def zero_f32x8() -> ir.Value:
    kind = _vector8(ir.F32Type.get())
    zero = ir.FloatAttr.get(ir.F32Type.get(), 0.0)
    return arith.constant(kind, ir.DenseElementsAttr.get_splat(kind, zero))


def scaled_add(total: ir.Value, weight: Word, values: ir.Value, valid: Word) -> ir.Value:
    """`total + weight * values` where valid, else `total`; weight is a float32 by its bits.

    Product and sum are rounded one after the other. Values that are not valid may be NaN.
    """
    kind = _vector8(ir.F32Type.get())
    factor = arith.bitcast(ir.F32Type.get(), weight.value)
    vector = llvm.mlir_undef(kind)
    for index in range(8):
        vector = llvm.insertelement(vector, factor, mgpu.c(index, _i32()))
    return arith.select(valid.value, arith.addf(total, arith.mulf(vector, values)), total)


# Channels in fp8. A word holds two bf16, or four e4m3; the lower channel is in the lower bits.


def peak_bf16(words: Sequence[Word], lanes: int) -> ir.Value:
    """The largest magnitude in the words of `lanes` neighbouring threads (a power of two), float32.

    NaN where there is one. Whole warps call it.
    """

    def larger(a: Word, b: Word) -> Word:
        ptx = "max.NaN.bf16x2 $0, $1, $2;"
        return Word(mgpu.inline_ptx(ptx, a.value, b.value, result_types=_i32()))

    found = functools.reduce(larger, [pair & 0x7FFF7FFF for pair in words])
    distance = 1
    while distance < lanes:
        found = larger(found, Word(mgpu.shfl_bfly(found.value, distance)))
        distance *= 2
    return arith.maximumf(*_two_floats(found))


def _two_floats(pair: Word) -> list[ir.Value]:
    return [arith.bitcast(ir.F32Type.get(), w.value) for w in (pair << 16, pair & -0x10000)]


def scale_of(peak: ir.Value, smallest: float, largest: float) -> ir.Value:
    """`max(peak, smallest) / largest`, float32."""
    number = lambda value: mgpu.c(value, ir.F32Type.get())
    return arith.divf(arith.maximumf(peak, number(smallest)), number(largest))


def float_word(value: ir.Value) -> Word:
    """The bits of a float32."""
    return Word(arith.bitcast(_i32(), value))


def narrow_e4m3(words: Sequence[Word], scale: ir.Value) -> list[Word]:
    """Channels / scale, rounded to the nearest e4m3 or to its largest: a word for two words."""
    ptx = (
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; "
        "cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }"
    )
    found = []
    for first, second in zip(words[::2], words[1::2], strict=True):
        channels = [*_two_floats(first), *_two_floats(second)]
        scaled = [arith.divf(channel, scale) for channel in channels]
        found.append(Word(mgpu.inline_ptx(ptx, *scaled, result_types=_i32())))
    return found


# Rows.


def pieces_of(count: int, threads: int, at_once: int) -> Iterator[tuple[list[Word], Word | None]]:
    """Which of a row's `count` pieces this thread takes, up to `at_once` together.

    The second is whether they exist, None where they do for all threads; where not, the first
    piece stands for them and may be read. `threads` is a power of two.
    """
    index, full = lane(threads), count // threads
    for first in range(0, full, at_once):
        yield [index + threads * j for j in range(first, min(first + at_once, full))], None
    if count % threads:
        last = index + threads * full
        inside = last < count
        yield [select(inside, last, 0)], inside


def copy_row(
    source: Word,
    targets: Callable[[], Sequence[tuple[Word, Word]]],
    row_bytes: int,
    threads: int = 128,
) -> None:
    """A row to every `(address, wanted)` target: read once, all accesses 16 bytes wide.

    `threads`, a power of two, share the work. The targets are worked out while the row is under
    way.
    """
    known = []
    for places, inside in pieces_of(row_bytes // VECTOR_BYTES, threads, CHUNKS_UNDER_WAY):
        offsets = [(place * VECTOR_BYTES).wide() for place in places]
        # All loads are under way before the first store waits for one.
        loaded = [load_wide(source + offset) for offset in offsets]
        if not known:
            known.extend(targets())
        for target, wanted in known:
            with when(wanted if inside is None else wanted & inside):
                for offset, values in zip(offsets, loaded, strict=True):
                    store_wide(target + offset, values)


# Words that other processes write or read.


def post(at: Word, value: Word) -> None:
    """Release-stores a flag to any memory: all that this thread, or a kernel before, wrote is
    there before the flag is."""
    mgpu.inline_ptx("st.release.sys.global.u32 [$0], $1;", at.value, value.value, result_types=None)


def post_near(at: Word, value: Word) -> None:
    """As `post`, for who runs on this GPU."""
    mgpu.inline_ptx("st.release.gpu.global.u32 [$0], $1;", at.value, value.value, result_types=None)


def _look(at: Word, order: str) -> Word:
    ptx = f"ld.{order}.sys.global.u32 $0, [$1];"
    return Word(mgpu.inline_ptx(ptx, at.value, result_types=_i32(), has_side_effects=True))


def look(at: Word) -> Word:
    """The newest value of a word that others write; orders nothing."""
    return _look(at, "relaxed")


def now_ns() -> Word:
    """The GPU's clock, nanoseconds, 64 bits."""
    return Word(mgpu.globaltimer())


def wait_for(
    at: Word, wanted: Word, start: Word, limit_ns: Word, abort: Word | None, epoch: Word
) -> Word:
    """Waits until the word at `at` is `wanted`; 1 if it came, 0 if not.

    Gives up `limit_ns` after `start`, or once the word at `abort`, where one is given, is above
    `epoch`. Acquires: what was written before the flag was posted may be read after it.
    """

    def look_at(turn: Word, aborted: Word) -> tuple[Word, Word]:
        came = (_look(at, "acquire") == wanted).narrow()
        if abort is None:
            return came, aborted
        asks = turn % ABORT_POLL_ROUNDS == ABORT_POLL_ROUNDS - 1
        polls = scf.IfOp(asks.value, [_i32()], has_else=True)
        with ir.InsertionPoint(polls.then_block):
            scf.yield_([(epoch.below(look(abort))).narrow().value])
        with ir.InsertionPoint(polls.else_block):
            scf.yield_([aborted.value])
        return came, Word(polls.results[0])

    return _poll(look_at, start, limit_ns)


def wait_near(at: Word, wanted: Word, otherwise: Word, start: Word, limit_ns: Word) -> Word:
    """Waits until the word at `at`, which this GPU writes, is `wanted` or `otherwise`.

    Returns 1 for the first, 2 for the second, 0 if neither came within `limit_ns` of `start`.
    Acquires.
    """

    def look_at(turn: Word, aborted: Word) -> tuple[Word, Word]:
        ptx = "ld.acquire.gpu.global.u32 $0, [$1];"
        seen = Word(mgpu.inline_ptx(ptx, at.value, result_types=_i32(), has_side_effects=True))
        return (seen == wanted).narrow() + (seen == otherwise).narrow() * 2, aborted

    return _poll(look_at, start, limit_ns)


def _poll(look_at, start: Word, limit_ns: Word) -> Word:
    """`look_at(turn, aborted) -> (came, aborted)` until either is not 0, or the time is over."""
    loop = scf.WhileOp([_i32()] * 3, [mgpu.c(0, _i32())] * 3)
    before = loop.before.blocks.append(_i32(), _i32(), _i32())
    with ir.InsertionPoint.at_block_begin(before):
        turn, aborted = Word(before.arguments[0]), Word(before.arguments[1])
        came, aborted = look_at(turn, aborted)
        in_time = (now_ns() - start).below(limit_ns)
        goes_on = (came == 0) & (aborted == 0) & in_time
        scf.condition(goes_on.value, [(turn + 1).value, aborted.value, came.value])
    after = loop.after.blocks.append(_i32(), _i32(), _i32())
    with ir.InsertionPoint.at_block_begin(after):
        scf.yield_(list(after.arguments))
    return Word(loop.results[2])


# Copies into shared memory beside the copy engine.


def copy_async(shared: Word, source: Word) -> None:
    """Starts a copy of 16 bytes into shared memory."""
    mgpu.inline_ptx(
        "cp.async.cg.shared.global [$0], [$1], 16;", shared.value, source.value, result_types=None
    )


def commit_async() -> None:
    """Closes a group of `copy_async`."""
    mgpu.inline_ptx("cp.async.commit_group;", result_types=None)


def await_async(groups_left: int) -> None:
    """Waits until at most `groups_left` groups of this thread are under way; then the matrix unit
    may read the others' bytes, once all threads that copied have met."""
    mgpu.inline_ptx(f"cp.async.wait_group {groups_left};", result_types=None)
    mgpu.inline_ptx("fence.proxy.async.shared::cta;", result_types=None)


def meet() -> None:
    """The threads of this warpgroup meet."""
    mgpu.warpgroup_barrier()
