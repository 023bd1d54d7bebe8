"""Integers of one GPU thread, and control flow over them."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

from pallas_kernels.simt.mlir import FragmentedArray, arith, ir, mgpu, plgpu, scf

WARP = 32  # threads

Ref = ir.Value  # of an array, inside a kernel
ref = plgpu.RefType()
scalar = plgpu.Layout.WG_SPLAT


def _binary(operation: Callable) -> "Callable[[Word, Word | int], Word]":
    return lambda self, other: Word(operation(self.value, self._other(other)))


def _comparison(name: str) -> "Callable[[Word, Word | int], Word]":
    return _binary(functools.partial(arith.cmpi, getattr(arith.CmpIPredicate, name)))


@dataclasses.dataclass(frozen=True, eq=False)
class Word:
    """An integer of one thread, 32 or 64 bits, two's complement, with Python's operators.

    Comparisons are signed, except `below`, and give a one-bit Word for `when`. `//`, `%` and `>>`
    are unsigned.
    """

    value: ir.Value

    @property
    def bits(self) -> int:
        return ir.IntegerType(self.value.type).width

    def _other(self, other: "Word | int") -> ir.Value:
        if isinstance(other, Word):
            if other.bits != self.bits:
                raise TypeError(f"a {self.bits}-bit and a {other.bits}-bit Word; use wide() first")
            return other.value
        return mgpu.c(int(other), self.value.type)

    __add__, __sub__, __mul__ = map(_binary, (arith.addi, arith.subi, arith.muli))
    __floordiv__, __mod__ = map(_binary, (arith.divui, arith.remui))
    __and__, __or__, __xor__ = map(_binary, (arith.andi, arith.ori, arith.xori))
    __lshift__, __rshift__ = map(_binary, (arith.shli, arith.shrui))
    __eq__, __ne__, __lt__, __gt__, __ge__ = map(_comparison, ("eq", "ne", "slt", "sgt", "sge"))
    __hash__ = None

    below = _comparison("ult")  # unsigned `<`

    def wide(self) -> "Word":
        """Zero-extended to 64 bits."""
        return self if self.bits == 64 else Word(arith.extui(i64(), self.value))

    def narrow(self) -> "Word":
        """The low 32 bits; a comparison becomes 0 or 1."""
        if self.bits > 32:
            return Word(arith.trunci(i32(), self.value))
        return self if self.bits == 32 else Word(arith.extui(i32(), self.value))


def i32() -> ir.IntegerType:
    return ir.IntegerType.get_signless(32)


def i64() -> ir.IntegerType:
    return ir.IntegerType.get_signless(64)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Names the enclosed part of a kernel in its debug locations; also a decorator.

    The counterpart of `jax.named_scope`, which does not reach into inline MLIR.
    """
    with ir.Location.name(name, ir.Location.current):
        yield


def word(number: int, bits: int = 32) -> Word:
    """A constant."""
    return Word(mgpu.c(number, ir.IntegerType.get_signless(bits)))


def select(condition: Word, yes: Word | int, no: Word | int) -> Word:
    """`yes` where the condition holds, else `no`."""
    like = yes if isinstance(yes, Word) else no
    as_value = lambda v: v.value if isinstance(v, Word) else mgpu.c(v, like.value.type)
    return Word(arith.select(condition.value, as_value(yes), as_value(no)))


def splat(array: FragmentedArray) -> Word:
    """The Word of a scalar that was passed with the layout `scalar`."""
    return Word(array.registers.flat[0])


def thread() -> Word:
    """Index of this thread in its block."""
    return Word(mgpu.thread_idx())


def lane(threads: int = 128) -> Word:
    """Index of this thread within its group of `threads`."""
    return thread() & (threads - 1)


def block() -> Word:
    """Index of this thread's block in the grid."""
    return Word(mgpu.block_idx())


@contextlib.contextmanager
def when(condition: Word) -> Iterator[None]:
    """Runs the `with` block in the threads for which the condition holds."""
    branch = scf.IfOp(condition.value)
    with ir.InsertionPoint(branch.then_block):
        yield
        scf.yield_([])


def each(start: Word, stop: Word | int, step: Word | int, body: Callable[[Word], None]) -> None:
    """`for i in range(start, stop, step): body(i)` in this thread, 32 bits."""
    bound = start._other(stop)
    loop = scf.ForOp(start.value, bound, start._other(step), [])
    with ir.InsertionPoint(loop.body):
        body(Word(loop.induction_variable))
        scf.yield_([])


def fold(
    start: Word, stop: Word | int, step: int, initial: Word, body: Callable[[Word, Word], Word]
) -> Word:
    """Like `each`, with a carried Word: `carry = body(i, carry)`."""
    loop = scf.ForOp(start.value, start._other(stop), start._other(step), [initial.value])
    with ir.InsertionPoint(loop.body):
        result = body(Word(loop.induction_variable), Word(loop.inner_iter_args[0]))
        scf.yield_([result.value])
    return Word(loop.results[0])


def update_if(
    wanted: Word, values: Sequence[ir.Value], update: Callable[[], Sequence[ir.Value]]
) -> list[ir.Value]:
    """`update()` where wanted, else `values`. A branch: loads of `update` happen only if taken."""
    branch = scf.IfOp(wanted.value, [value.type for value in values], has_else=True)
    with ir.InsertionPoint(branch.then_block):
        scf.yield_(list(update()))
    with ir.InsertionPoint(branch.else_block):
        scf.yield_(list(values))
    return list(branch.results)


def ballot(condition: Word) -> Word:
    """Word whose bit i says whether the condition holds in lane i; all 32 lanes must call it."""
    ptx = "{ .reg .pred p; setp.ne.u32 p, $1, 0; vote.sync.ballot.b32 $0, p, -1; }"
    held = condition.narrow().value
    return Word(
        mgpu.inline_ptx(ptx, held, result_types=i32(), has_side_effects=True, convergent=True)
    )
