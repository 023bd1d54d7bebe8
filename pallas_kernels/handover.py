"""Values that one operation on a GPU hands to the next: received rows, addresses, written results.

dispatch → RowsInWindow → expert_gemm → ResultsAtHome → combine
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Float32, Int32, UInt8

from pallas_kernels import simt
from pallas_kernels.exchange.call import Call, ExchangeSpec
from pallas_kernels.exchange.fp8 import unpack_rows
from pallas_kernels.exchange.gpu import exchange_scalars, open_heap, read_region
from pallas_kernels.grouping import ExpertRows
from pallas_kernels.simt import Word


@jax.tree_util.register_dataclass
@typing.no_type_check  # leaves may be abstract under tree.map
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsInWindow:
    """Rows that dispatch received, left where they arrived, grouped by expert slot.

    Valid until the next use of the window's half.
    """

    heap: UInt8[Array, "N B"]
    call: Call  # of this use of the window
    slots: Int32[Array, "R T K"]
    lists: ExpertRows
    spec: ExchangeSpec = dataclasses.field(metadata={"static": True})
    tile_rows: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int, int]:
        """That of the rows: `(R, T, D)`."""
        return (*self.slots.shape[:2], self.spec.layout.hidden)

    def array(self) -> Float[Array, "R T D"]:
        """A copy; rows without a slot here are zero. fp8 rows are widened to the row dtype."""
        layout = self.spec.layout
        rows = self._read("rows")
        if layout.dispatch_dtype:
            rows = unpack_rows(rows, layout.hidden, jnp.dtype(layout.row_dtype))
        return jnp.where((self.slots >= 0).any(-1)[..., None], rows, 0)

    def weights(self) -> Float32[Array, "R T K"]:
        """The weights that the sources sent; zero for choices that run elsewhere."""
        weights = self._read("weights")
        return jnp.where(self.slots >= 0, weights, 0)

    def source(self) -> "InWindow | InArray":
        """The rows as the expert GEMM reads them; fp8 rows are first widened into an array."""
        if self.spec.layout.dispatch_dtype:
            return InArray(self.array(), self.slots.shape[2])
        return InWindow(self.spec, *self._window, *self.slots.shape[1:])

    def homes(self) -> "Homes | None":
        """Where results may be written at once; None if they are summed before they travel."""
        if self.spec.layout.combine != "per_choice":
            return None
        return Homes(self.spec, *self._window, self.slots.shape)

    @property
    def _window(self) -> tuple[Array, Array, Array]:
        refs = exchange_scalars(self.call)
        return self.heap, refs.round, refs.rank

    def _read(self, name: str) -> Array:
        after = self.lists.num_tiles
        found = read_region(name, self.spec, self.heap, self.call, after)
        return found[:, : self.slots.shape[1]]


class InWindow(typing.NamedTuple):
    """Rows in the own window of this round."""

    spec: ExchangeSpec
    heap: UInt8[Array, "N B"]
    round: Array
    rank: Array
    tokens: int
    choices: int

    @property
    def operands(self) -> tuple[Array, ...]:
        return (self.heap, self.round, self.rank)

    def start(self, refs: tuple, row: Word) -> Word:
        """Part of a kernel: address of row `s * T + t`."""
        heap = open_heap(self.spec, *refs)
        return heap.region("rows", heap.rank, row // self.tokens, row % self.tokens)


class InArray(typing.NamedTuple):
    """Rows in an array."""

    rows: BFloat16[Array, "R T D"]
    choices: int

    @property
    def operands(self) -> tuple[Array, ...]:
        return (self.rows,)

    def start(self, refs: tuple, row: Word) -> Word:
        """Part of a kernel: address of row `s * T + t`."""
        return simt.address(refs[0], row.wide() * (self.rows.shape[-1] * 2))


class Homes(typing.NamedTuple):
    """Windows of the rows' sources: a result goes to `returns[this rank, t, k]` there."""

    spec: ExchangeSpec
    heap: UInt8[Array, "N B"]
    round: Array
    rank: Array
    shape: tuple[int, int, int]  # (R, T, K)

    @property
    def operands(self) -> tuple[Array, ...]:
        return (self.heap, self.round, self.rank)

    def start(self, refs: tuple, pair: Word) -> Word:
        """Part of a kernel: address for the result of choice `(s * T + t) * K + k`."""
        _, tokens, choices = self.shape
        heap, of_source = open_heap(self.spec, *refs), tokens * choices
        inside = pair % of_source
        token, choice = inside // choices, inside % choices
        return heap.region("returns", pair // of_source, heap.rank, token, choice)


@jax.tree_util.register_dataclass
@typing.no_type_check  # leaves may be abstract under tree.map
@dataclasses.dataclass(frozen=True, kw_only=True)
class ResultsAtHome:
    """Results that the expert GEMM wrote into their owners' windows; flags are not posted yet."""

    written: Array  # an output of the kernel that wrote them
    shape: tuple[int, int, int, int] = dataclasses.field(metadata={"static": True})  # (R, T, K, D)
