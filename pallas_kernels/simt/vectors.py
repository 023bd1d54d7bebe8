"""Eight bfloat16 channels at a time, channels in fp8, and copies of whole rows."""

import functools
from collections.abc import Callable, Iterator, Sequence

from pallas_kernels.simt.memory import VECTOR_BYTES, load_wide, pointer, store_wide
from pallas_kernels.simt.mlir import arith, ir, llvm, mgpu
from pallas_kernels.simt.word import Word, i32, lane, select, when

CHUNKS_UNDER_WAY = 8  # of a row, for each thread that copies it


def _vector8(element: ir.Type) -> ir.VectorType:
    return ir.VectorType.get((8,), element)


def load_bf16x8(at: Word) -> ir.Value:
    """Eight bf16 as a vector of eight float32."""
    loaded = llvm.load(_vector8(ir.BF16Type.get()), pointer(at), alignment=VECTOR_BYTES)
    return arith.extf(_vector8(ir.F32Type.get()), loaded)


def load_bf16x8_if(wanted: Word, at: Word) -> ir.Value:
    """`load_bf16x8` where wanted, else zeros without an access.

    Predicated, not branched: consecutive loads overlap.
    """
    words = mgpu.inline_ptx(
        "{ .reg .pred p; setp.ne.u32 p, $5, 0; mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; "
        "mov.u32 $3, 0; @p ld.global.v4.u32 {$0, $1, $2, $3}, [$4]; }",
        at.value,
        wanted.narrow().value,
        result_types=(i32(),) * 4,
        has_side_effects=True,
    )
    vector = llvm.mlir_undef(ir.VectorType.get((4,), i32()))
    for index, value in enumerate(words):
        vector = llvm.insertelement(vector, value, mgpu.c(index, i32()))
    narrow = llvm.bitcast(_vector8(ir.BF16Type.get()), vector)
    return arith.extf(_vector8(ir.F32Type.get()), narrow)


def store_bf16x8(at: Word, values: ir.Value) -> None:
    """Eight float32, rounded to bf16: 16 bytes."""
    narrow = arith.truncf(_vector8(ir.BF16Type.get()), values)
    llvm.store(narrow, pointer(at), alignment=VECTOR_BYTES)


def store_f32x8(at: Word, values: ir.Value) -> None:
    """Eight float32, 32 bytes."""
    for half in range(2):
        kept = mgpu.vector_slice(values, slice(4 * half, 4 * half + 4))
        llvm.store(kept, pointer(at + VECTOR_BYTES * half), alignment=VECTOR_BYTES)


def zero_f32x8() -> ir.Value:
    """Eight float32 zeros."""
    kind = _vector8(ir.F32Type.get())
    zero = ir.FloatAttr.get(ir.F32Type.get(), 0.0)
    return arith.constant(kind, ir.DenseElementsAttr.get_splat(kind, zero))


def scaled_add(total: ir.Value, weight: Word, values: ir.Value, valid: Word) -> ir.Value:
    """`total + weight * values` where valid, else `total`.

    `weight` holds the bits of a float32. Product and sum are rounded separately (no fused
    multiply-add). Invalid values may be NaN.
    """
    kind = _vector8(ir.F32Type.get())
    factor = arith.bitcast(ir.F32Type.get(), weight.value)
    vector = llvm.mlir_undef(kind)
    for index in range(8):
        vector = llvm.insertelement(vector, factor, mgpu.c(index, i32()))
    return arith.select(valid.value, arith.addf(total, arith.mulf(vector, values)), total)


# Channels in fp8. A word holds two bf16, or four e4m3; the lower channel is in the lower bits.


def peak_bf16(words: Sequence[Word], lanes: int) -> ir.Value:
    """Largest magnitude in the words of `lanes` adjacent threads (a power of two), float32.

    NaN propagates. Whole warps must call it.
    """

    def larger(a: Word, b: Word) -> Word:
        ptx = "max.NaN.bf16x2 $0, $1, $2;"
        return Word(mgpu.inline_ptx(ptx, a.value, b.value, result_types=i32()))

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
    return Word(arith.bitcast(i32(), value))


def narrow_e4m3(words: Sequence[Word], scale: ir.Value) -> list[Word]:
    """Channels / scale as e4m3, saturated and rounded to nearest: one word for every two."""
    ptx = (
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; "
        "cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }"
    )
    found = []
    for first, second in zip(words[::2], words[1::2], strict=True):
        channels = [*_two_floats(first), *_two_floats(second)]
        scaled = [arith.divf(channel, scale) for channel in channels]
        found.append(Word(mgpu.inline_ptx(ptx, *scaled, result_types=i32())))
    return found


# Rows.


def pieces_of(count: int, threads: int, at_once: int) -> Iterator[tuple[list[Word], Word | None]]:
    """Distributes the `count` pieces of a row over `threads` (a power of two) threads.

    Yields `(pieces, inside)`: up to `at_once` indices of this thread, and whether they exist, None
    if they do in all threads. An index that does not exist is replaced by 0, which may be read.
    With 10 pieces and 4 threads, thread 1 gets `[1, 5], None`, then `[9], True`; thread 3 gets
    `[3, 7], None`, then `[0], False`.
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
    """Copies a row to every `(address, wanted)` target; reads it once, 16 bytes per access.

    `threads`, a power of two, share the work. `targets` is called after the first loads have been
    issued, so computing addresses overlaps with them.
    """
    known = []
    for places, inside in pieces_of(row_bytes // VECTOR_BYTES, threads, CHUNKS_UNDER_WAY):
        offsets = [(place * VECTOR_BYTES).wide() for place in places]
        # All loads are issued before the first store waits for one.
        loaded = [load_wide(source + offset) for offset in offsets]
        if not known:
            known.extend(targets())
        for target, wanted in known:
            with when(wanted if inside is None else wanted & inside):
                for offset, values in zip(offsets, loaded, strict=True):
                    store_wide(target + offset, values)
