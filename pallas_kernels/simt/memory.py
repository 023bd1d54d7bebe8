"""Addresses, loads, stores and atomics of single threads, in global, peer and shared memory."""

from collections.abc import Sequence

from pallas_kernels.simt.mlir import ir, llvm, mgpu, scf
from pallas_kernels.simt.word import Ref, Word, i32, i64

VECTOR_BYTES = 16  # the widest access of one thread


def address(reference: Ref, offset: Word | int = 0) -> Word:
    """Address of a byte of an array in GPU memory, or in shared memory (32 bits)."""
    pointer = mgpu.memref_ptr(reference)
    shared = llvm.PointerType(pointer.type).address_space == 3
    start = Word(llvm.ptrtoint(i32() if shared else i64(), pointer))
    if isinstance(offset, Word):
        offset = offset.narrow() if shared else offset.wide()
    return start + offset


def entry(reference: Ref, index: Word) -> Word:
    """Address of a 32-bit entry of a flat array."""
    return address(reference, index.wide() * 4)


def pointer(at: Word) -> ir.Value:
    """LLVM pointer of an address: global for 64-bit Words, shared for 32-bit ones."""
    return llvm.inttoptr(llvm.PointerType.get(3 if at.bits == 32 else 1), at.value)


def load(at: Word) -> Word:
    """A 32-bit word."""
    return Word(llvm.load(i32(), pointer(at), alignment=4))


def word_at(reference: Ref, index: int = 0) -> Word:
    """A 32-bit entry of a flat array."""
    return load(address(reference, 4 * index))


def load_if(wanted: Word, at: Word) -> Word:
    """A 32-bit word where wanted, else 0 without an access."""
    branch = scf.IfOp(wanted.value, [i32()], has_else=True)
    with ir.InsertionPoint(branch.then_block):
        scf.yield_([load(at).value])
    with ir.InsertionPoint(branch.else_block):
        scf.yield_([mgpu.c(0, i32())])
    return Word(branch.results[0])


def store(at: Word, value: Word) -> None:
    """A 32-bit word."""
    llvm.store(value.value, pointer(at), alignment=4)


def load_words(at: Word, count: int) -> list[Word]:
    """`count` (2 or 4) adjacent words in one access; `at` must be aligned to all of them."""
    kind = ir.VectorType.get((count,), i32())
    loaded = llvm.load(kind, pointer(at), alignment=4 * count)
    return [Word(llvm.extractelement(loaded, mgpu.c(i, i32()))) for i in range(count)]


def store_words(at: Word, words: Sequence[Word]) -> None:
    """2 or 4 adjacent words in one access."""
    vector = llvm.mlir_undef(ir.VectorType.get((len(words),), i32()))
    for index, value in enumerate(words):
        vector = llvm.insertelement(vector, value.value, mgpu.c(index, i32()))
    llvm.store(vector, pointer(at), alignment=4 * len(words))


def load_wide(at: Word) -> ir.Value:
    """16 bytes, uninterpreted, for `store_wide`."""
    return llvm.load(ir.VectorType.get((4,), i32()), pointer(at), alignment=VECTOR_BYTES)


def store_wide(at: Word, value: ir.Value) -> None:
    """16 bytes of `load_wide`."""
    llvm.store(value, pointer(at), alignment=VECTOR_BYTES)


def add_shared(at: Word, amount: int) -> Word:
    """Atomic add in shared memory, relaxed; returns the previous value."""
    return Word(
        mgpu.inline_ptx(
            "atom.shared.add.u32 $0, [$1], $2;",
            at.value,
            mgpu.c(amount, i32()),
            result_types=i32(),
            has_side_effects=True,
        )
    )


def max_shared(at: Word, value: Word) -> None:
    """Atomic unsigned maximum in shared memory, relaxed."""
    ptx = "red.shared.max.u32 [$0], $1;"
    mgpu.inline_ptx(ptx, at.value, value.value, result_types=None)


def count_up(at: Word, last: int) -> Word:
    """Atomic increment in global memory that wraps to 0 after `last`; returns the previous value.

    acq_rel at GPU scope: a thread that reads n observes all writes made before increments 0..n-1.
    """
    return Word(
        mgpu.inline_ptx(
            "atom.acq_rel.gpu.global.inc.u32 $0, [$1], $2;",
            at.value,
            mgpu.c(last, i32()),
            result_types=i32(),
            has_side_effects=True,
        )
    )


def copy_async(shared: Word, source: Word) -> None:
    """Starts a copy of 16 bytes from global to shared memory (`cp.async`); see `commit_async`."""
    mgpu.inline_ptx(
        "cp.async.cg.shared.global [$0], [$1], 16;", shared.value, source.value, result_types=None
    )
