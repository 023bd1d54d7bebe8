"""Expert weights of a rank: slots in its slab of the heap, written in place, read by peers."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from eep_jax.config import EngineConfig, ModelConfig
from eep_jax.heap.copies import copy_values
from eep_jax.heap.heap import SymmetricHeap
from eep_jax.placement.placement import EMPTY
from pallas_kernels.sizes import WIDTH_MULTIPLE
from pallas_kernels.window import Region, WindowLayout, round_up

PAGE_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class SlabLayout:
    """One rank's slab: the window that peers write, then the bank that peers read, from a new page.

    On a GPU the F channels of an expert are padded with zeros to `width_multiple`, the tile of its
    kernels; they do not change results.
    """

    window: WindowLayout
    slots: int
    expert_shape: tuple[int, ...]  # without padding: [L 3 F D]
    bank_dtype: str = "float32"
    width_multiple: int = 1

    @property
    def padded_shape(self) -> tuple[int, ...]:
        layers, matrices, width, hidden = self.expert_shape
        return (layers, matrices, round_up(width, self.width_multiple), hidden)

    @functools.cached_property
    def bank(self) -> Region:
        offset = round_up(self.window.window_bytes, PAGE_BYTES)
        shape = (self.slots, *self.padded_shape)
        return Region("bank", offset, np.dtype(self.bank_dtype), shape)

    @functools.cached_property
    def slot_bytes(self) -> int:
        return math.prod(self.padded_shape) * self.bank.dtype.itemsize

    @property
    def words(self) -> Region:
        """The bank as words `[S W]`, for slot checks: 32 bits if a slot is a multiple, else 16."""
        dtype = np.dtype("uint16" if self.slot_bytes % 4 else "uint32")
        shape = (self.slots, self.slot_bytes // dtype.itemsize)
        return Region("words", self.bank.offset, dtype, shape)

    def slot_offset(self, slot: int) -> int:
        """Offset of a slot in the slab. Raises ValueError if `slot` is out of range."""
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot {slot} is not in 0..{self.slots - 1}")
        return self.bank.offset + slot * self.slot_bytes

    def slot(self, slot: int) -> Region:
        """One slot of the bank. Raises ValueError if `slot` is out of range."""
        return Region("slot", self.slot_offset(slot), self.bank.dtype, self.padded_shape)

    @property
    def slab_bytes(self) -> int:
        return round_up(self.bank.offset + self.bank.bytes, PAGE_BYTES)


def slab_layout(
    model: ModelConfig,
    engine: EngineConfig,
    ranks: int,
    slots: int,
    *,
    row_dtype: str = "",
    bank_dtype: str = "",
) -> SlabLayout:
    """Layout of a rank's window and bank. Both dtypes default to the engine's."""
    dtype = bank_dtype or engine.dtype
    window = WindowLayout(
        ranks=ranks,
        tokens=engine.tokens_max,
        choices=model.experts_per_token,
        hidden=model.hidden,
        combine=engine.combine,
        row_dtype=row_dtype or engine.dtype,
        dispatch_dtype=engine.dispatch_dtype,
    )
    multiple = WIDTH_MULTIPLE if dtype == "bfloat16" else 1
    return SlabLayout(window, slots, model.expert_shape, dtype, multiple)


class ExpertBank:
    """The slots of one rank. `contents[slot]` is the expert of a completely written slot."""

    def __init__(self, layout: SlabLayout, heap: SymmetricHeap):
        self.layout, self._heap = layout, heap
        self._contents = [EMPTY] * layout.slots

    @property
    def contents(self) -> tuple[int, ...]:
        return tuple(self._contents)

    @property
    def rank(self) -> int:
        return self._heap.rank

    @property
    def dtype(self) -> np.dtype:
        return self.layout.bank.dtype

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights, without padding."""
        return math.prod(self.layout.expert_shape) * self.dtype.itemsize

    def write(self, slot: int, expert: int, weights: np.ndarray) -> None:
        """Fills a slot, converting to the bank's dtype; it is empty until it is complete.

        Raises ValueError unless the weights have shape `[L 3 F D]`.
        """
        self.write_all([(slot, expert, weights)])

    def write_all(self, experts: Iterable[tuple[int, int, np.ndarray]]) -> None:
        """`write` of each (slot, expert, weights), consumed one by one, with one wait for all."""
        begun = []

        def converted() -> Iterator[tuple[int, np.ndarray]]:
            for slot, expert, weights in experts:
                offset = self.layout.slot_offset(slot)
                self._contents[slot] = EMPTY
                yield offset, self._as_stored(expert, weights)
                begun.append((slot, expert))

        self._heap.write_all(converted())
        for slot, expert in begun:
            self._contents[slot] = expert

    def _as_stored(self, expert: int, weights: np.ndarray) -> np.ndarray:
        region, shape = self.layout.slot(0), self.layout.expert_shape
        if np.shape(weights) != shape:
            raise ValueError(f"expert {expert} has shape {np.shape(weights)}, expected {shape}")
        values = np.asarray(weights).astype(region.dtype, copy=False)
        if region.shape != shape:
            missing = [(0, full - own) for full, own in zip(region.shape, shape, strict=True)]
            values = np.pad(values, missing)
        return values

    def copy_all(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Copies whole slots inside the heap, each (own slot, rank, slot of that rank).

        The own slots are empty until `holds` names their verified experts.
        """
        layout, nbytes, moves = self.layout, self.layout.slot_bytes, []
        for slot, rank, source in copies:
            moves.append((layout.slot_offset(slot), rank, layout.slot_offset(source), nbytes))
            self._contents[slot] = EMPTY
        self._heap.copy_in_all(_joined(moves, self.rank))

    def holds(self, slot: int, expert: int) -> None:
        """Marks a slot, written by `copy_all` or since `begin`, as holding this expert."""
        self._contents[slot] = expert

    def target(self, slot: int) -> "SlotTarget":
        """Memory of a slot, to fill block by block after `begin`."""
        return SlotTarget(self.layout, self._heap, slot)

    def begin(self, slot: int) -> None:
        """Marks a slot as empty until `holds`, and zeroes its padding."""
        self._contents[slot] = EMPTY
        region, shape = self.layout.slot(slot), self.layout.expert_shape
        if region.shape != shape:
            own, full = (math.prod(s[2:]) * self.dtype.itemsize for s in (shape, region.shape))
            for matrix in range(math.prod(shape[:2])):
                self._heap.fill_zero(region.offset + matrix * full + own, full - own)

    def clear(self, slot: int) -> None:
        self._contents[slot] = EMPTY

    def read(self, slot: int) -> np.ndarray:
        """Copy of an own slot, `[L 3 F D]` in the bank's dtype."""
        return self.read_peer(self._heap.rank, slot)

    def is_mapped(self, rank: int) -> bool:
        """Whether the bank of `rank` is memory of this host, not read over a network."""
        return self._heap.is_mapped(rank)

    def read_peer(self, rank: int, slot: int) -> np.ndarray:
        """Copy of a slot of an attached peer, `[L 3 F D]`; undefined for a detached one."""
        region = self.layout.slot(slot)
        found = self._heap.read(rank, region.offset, region.bytes)
        whole = found.view(region.dtype).reshape(region.shape)
        return whole[:, :, : self.layout.expert_shape[2]]


def _joined(copies: list[tuple[int, int, int, int]], own: int) -> list[tuple[int, int, int, int]]:
    """Merges adjacent copies (offset, rank, source offset, bytes) from the same peer.

    Copies within the own slab are not merged: disjoint slots could overlap once merged.
    """
    joined: list[tuple[int, int, int, int]] = []
    for offset, rank, source, nbytes in copies:
        if joined and rank != own:
            first, from_rank, from_source, length = joined[-1]
            if (first + length, from_rank, from_source + length) == (offset, rank, source):
                joined[-1] = (first, rank, from_source, length + nbytes)
                continue
        joined.append((offset, rank, source, nbytes))
    return joined


@dataclasses.dataclass(frozen=True)
class SlotTarget:
    """Memory of a slot, written in any order by several threads; see storage/blocks.py.

    `at` counts values of `[L 3 F D]` in C order, without padding.
    """

    layout: SlabLayout
    heap: SymmetricHeap
    slot: int

    @property
    def dtype(self) -> np.dtype:
        return self.layout.bank.dtype

    def memory(self, at: int, count: int) -> np.ndarray | None:
        """`[count]` values in the slab; None on a device, or if padding lies between them."""
        parts = list(self._parts(at, count))
        if self.heap.device != "cpu" or len(parts) != 1:
            return None
        ((offset, _),) = parts
        own = self.heap.whole()[self.heap.rank]
        return own[offset : offset + count * self.dtype.itemsize].view(self.dtype)

    def put(self, at: int, values: np.ndarray) -> None:
        """Stores converted values; a transposed matrix must lie between paddings."""
        memory = self.memory(at, values.size)
        if memory is not None:
            copy_values(memory.reshape(values.shape), values)
            return
        flat = np.ascontiguousarray(values).astype(self.dtype, copy=False).reshape(-1)
        for offset, count in self._parts(at, flat.size):
            self.heap.write(offset, flat[:count])
            flat = flat[count:]

    def _parts(self, at: int, count: int) -> Iterator[tuple[int, int]]:
        """(offset in the slab, number of values) of each run without padding."""
        own, full = (math.prod(s[2:]) for s in (self.layout.expert_shape, self.layout.padded_shape))
        base, itemsize = self.layout.slot(self.slot).offset, self.dtype.itemsize
        if own == full:
            yield base + at * itemsize, count
            return
        while count > 0:
            matrix, inside = divmod(at, own)
            run = min(count, own - inside)
            yield base + (matrix * full + inside) * itemsize, run
            at, count = at + run, count - run
