"""Grouping of received choices by slot, as a part of the kernel that received them."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from pallas_kernels import simt
from pallas_kernels.exchange.call import ExchangeSpec
from pallas_kernels.exchange.gpu import Heap
from pallas_kernels.grouping import tiles_max
from pallas_kernels.simt import GROUP_THREADS, Ref, Word, entry

UNROLLED_SLOTS = 64  # up to which a sum over slots is no loop


@dataclasses.dataclass(frozen=True)
class RowLists:
    """Writer of `slots [R T K]` and ExpertRows, in the block that waited for the partners.

    Args:
        spec: of the exchange.
        tokens: T of this exchange.
        choices: K.
        tile_rows: rows of a tile of the expert GEMM.
    """

    spec: ExchangeSpec
    tokens: int
    choices: int
    tile_rows: int

    @property
    def slots(self) -> int:
        return self.spec.slots_per_rank

    @property
    def pairs(self) -> int:
        return self.spec.ranks * self.tokens * self.choices

    @property
    def rows_max(self) -> int:
        """Choices of one slot at most: a token chooses an expert at most once."""
        return self.spec.ranks * self.tokens

    @property
    def groups(self) -> int:
        """Warpgroups of a block, a power of two: few choices need few threads."""
        wanted = self.pairs // (4 * GROUP_THREADS)
        return max(groups for groups in (1, 2, 4, 8) if groups <= max(1, wanted))

    @property
    def out(self) -> dict:
        """Shapes and dtypes of the outputs: the slots, then those of ExpertRows in their order."""
        tiles = tiles_max(self.pairs, self.slots, self.tile_rows)
        lengths = {
            "slots": self.pairs,
            "grouped": self.slots * self.rows_max,
            "counts": self.slots,
            "num_tiles": 1,
            "tile_slots": tiles,
            "tile_firsts": tiles,
        }
        return {name: ((length,), jnp.int32) for name, length in lengths.items()}

    def clear(self, counts: Ref, threads: int) -> None:
        """Part of a kernel: zeroes `counts` in shared memory; a barrier must follow."""
        zero = lambda slot: simt.store(entry(counts, slot), simt.word(0))
        simt.each(simt.thread(), self.slots, threads, zero)

    @simt.phase("list rows")
    def collect(
        self, heap: Heap, arrived: Ref, counts: Ref, outs: Sequence[Ref], threads: int
    ) -> None:
        """Part of a kernel, called by all threads of the block after a barrier.

        Args:
            heap: of this use of the window.
            arrived: int32 [R] in shared memory, 1 for the sources whose rows may be read.
            counts: int32 [S] in shared memory, zeroed by `clear`.
            outs: references to the outputs, in the order of `out`.
            threads: of the block.
        """
        slots_out, grouped, counts_out, num_tiles, tile_slots, tile_firsts = outs
        thread, per_source = simt.thread(), self.tokens * self.choices

        def four(index: Word) -> None:
            pair = index * 4
            source = pair // per_source
            came = simt.load(entry(arrived, source)) != 0
            inside = pair % per_source
            start = heap.region("slots", heap.rank, source) + inside.wide() * 4
            found = simt.load_words(start, 4)
            found = [simt.select(came, slot, simt.word(-1)) for slot in found]
            simt.store_words(entry(slots_out, pair), found)
            for position, slot in enumerate(found):
                # Unsigned, so that -1, and whatever else a window may hold by mistake, is excluded.
                with simt.when(slot.below(self.slots)):
                    place = simt.add_shared(entry(counts, slot), 1)
                    row = slot * self.rows_max + place
                    simt.store(entry(grouped, row), pair + position)

        simt.each(thread, self.pairs // 4, threads, four)
        simt.barrier()  # After: `counts` is final.

        def in_tiles(slot: Word) -> Word:
            count = simt.load(entry(counts, slot))
            return (count + (self.tile_rows - 1)) // self.tile_rows

        def before(slot: Word) -> Word:
            """Tiles of all lower slots."""
            zero = simt.word(0)
            if self.slots > UNROLLED_SLOTS:
                return simt.fold(zero, slot, 1, zero, lambda s, total: total + in_tiles(s))
            total = zero
            for lower in map(simt.word, range(self.slots - 1)):
                total = total + simt.select(lower < slot, in_tiles(lower), 0)
            return total

        def list_tiles(slot: Word) -> None:
            first, mine, zero = before(slot), in_tiles(slot), simt.word(0)
            simt.store(entry(counts_out, slot), simt.load(entry(counts, slot)))

            def one(tile: Word) -> None:
                simt.store(entry(tile_slots, first + tile), slot)
                simt.store(entry(tile_firsts, first + tile), tile * self.tile_rows)

            simt.each(zero, mine, 1, one)
            with simt.when(slot == self.slots - 1):
                simt.store(entry(num_tiles, zero), first + mine)

        simt.each(thread, self.slots, threads, list_tiles)
