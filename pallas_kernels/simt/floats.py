"""Floating-point arithmetic of one thread: single float32 values and eight of them at a time."""

from collections.abc import Callable, Sequence

from pallas_kernels.simt.memory import VECTOR_BYTES, pointer
from pallas_kernels.simt.mlir import arith, ir, llvm, mgpu, scf
from pallas_kernels.simt.word import Word, i32

# Operations on two float32 values, or on two vectors of eight. Each rounds; none is contracted.
add_float, subtract_float = arith.addf, arith.subf
multiply_float, divide_float = arith.mulf, arith.divf
max_float = arith.maximumf  # NaN if either is


def as_float(bits: Word) -> ir.Value:
    """The float32 with these bits."""
    return arith.bitcast(ir.F32Type.get(), bits.value)


def exp2(power: ir.Value) -> ir.Value:
    """2 to the power of a float32, by the special function unit; 0 for -inf."""
    ptx = "ex2.approx.ftz.f32 $0, $1;"
    return mgpu.inline_ptx(ptx, power, result_types=ir.F32Type.get())


def splat_f32x8(value: ir.Value) -> ir.Value:
    """A float32 eight times."""
    vector = llvm.mlir_undef(ir.VectorType.get((8,), ir.F32Type.get()))
    for index in range(8):
        vector = llvm.insertelement(vector, value, mgpu.c(index, i32()))
    return vector


def load_f32x8(low: Word, high: Word) -> ir.Value:
    """Eight float32, four from each address."""
    kind = ir.VectorType.get((4,), ir.F32Type.get())
    return mgpu.vector_concat(
        [llvm.load(kind, pointer(at), alignment=VECTOR_BYTES) for at in (low, high)]
    )


def fold_values(
    start: Word,
    stop: Word | int,
    step: Word | int,
    initial: Sequence[ir.Value],
    body: Callable[[Word, tuple[ir.Value, ...]], Sequence[ir.Value]],
) -> list[ir.Value]:
    """`for i in range(start, stop, step): values = body(i, values)`, from `initial` on."""
    loop = scf.ForOp(start.value, start._other(stop), start._other(step), list(initial))
    with ir.InsertionPoint(loop.body):
        scf.yield_(list(body(Word(loop.induction_variable), tuple(loop.inner_iter_args))))
    return list(loop.results)
