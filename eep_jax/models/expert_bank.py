"""The expert weights of a rank: slots in its slab of the heap, written in place, read by peers."""

import dataclasses
import functools
import math

import numpy as np

from eep_jax.config import EngineConfig, ModelConfig
from eep_jax.heap.heap import SymmetricHeap
from eep_jax.placement.placement import EMPTY
from pallas_kernels.window import Region, WindowLayout, round_up, view

PAGE_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class SlabLayout:
    """One rank's slab: the window that peers write, then the bank that peers read."""

    window: WindowLayout
    slots: int
    expert_shape: tuple[int, ...]

    @functools.cached_property
    def bank(self) -> Region:
        offset = round_up(self.window.window_bytes, PAGE_BYTES)
        return Region("bank", offset, np.dtype(np.float32), (self.slots, *self.expert_shape))

    @property
    def slab_bytes(self) -> int:
        return round_up(self.bank.offset + self.bank.bytes, PAGE_BYTES)


def slab_layout(model: ModelConfig, engine: EngineConfig, ranks: int, slots: int) -> SlabLayout:
    window = WindowLayout(
        ranks=ranks,
        tokens=engine.tokens_max,
        choices=model.experts_per_token,
        hidden=model.hidden,
        combine=engine.combine,
    )
    return SlabLayout(window, slots, model.expert_shape)


class ExpertBank:
    """The slots of one rank. `contents[slot]` names a slot's expert once it is written whole."""

    def __init__(self, layout: SlabLayout, heap: SymmetricHeap):
        self.layout, self._heap = layout, heap
        self.weights = view(heap.whole()[heap.rank], layout.bank)  # float32 [S L 3 F D]
        self._contents = [EMPTY] * layout.slots

    @property
    def contents(self) -> tuple[int, ...]:
        return tuple(self._contents)

    @property
    def expert_bytes(self) -> int:
        return math.prod(self.layout.expert_shape) * 4

    def write(self, slot: int, expert: int, weights: np.ndarray) -> None:
        """Fills a slot; while it is written it holds no expert."""
        self._contents[slot] = EMPTY
        self.weights[slot] = weights
        self._contents[slot] = expert

    def clear(self, slot: int) -> None:
        self._contents[slot] = EMPTY

    def of_peer(self, rank: int) -> np.ndarray:
        """The bank of an attached peer, float32 `[S L 3 F D]`, to read from."""
        return view(self._heap.whole()[rank], self.layout.bank)
