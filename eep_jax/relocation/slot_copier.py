"""Copies of experts from this host's memory, made together and checked on the device.

Slots of the own rank and of mapped peers are copied inside the heap; own backups are uploaded. All
copies are under way before one is waited for. The host reads none of their bytes: the fingerprint
of a filled slot is compared with that of its expert.
"""

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from eep_jax.errors import HeapError, RelocationFailed
from eep_jax.models.expert_bank import ExpertBank
from eep_jax.placement.planner import Move
from eep_jax.placement.sources import SourceKind
from eep_jax.relocation.slot_check import SlotCheck
from eep_jax.relocation.source_reader import SourceReader

Filled = tuple[Move, float, str | None]  # a move by its first source; seconds; why it failed


class SlotCopier:
    """Fills slots by the first sources of moves. Call from the engine thread only."""

    def __init__(self, bank: ExpertBank, check: SlotCheck | None, reader: SourceReader):
        self._bank, self._check, self._reader = bank, check, reader

    def can(self, move: Move) -> bool:
        """Whether the first source is in this host's memory, and the slot can be checked."""
        if self._check is None or not move.sources:
            return False
        source = move.sources[0]
        if source.kind is SourceKind.LOCAL:
            is_here = self._bank.contents[source.slot] == move.expert
        else:
            is_here = self._reader.is_in_memory(source) or self._reader.is_own_backup(source)
        return is_here and self._check.known(move.expert) is not None

    def fill(self, moves: Sequence[Move]) -> Iterator[Filled]:
        """Fills the slots of `moves`, each accepted by `can`. A slot that failed holds nothing."""
        uploads = [move for move in moves if self._reader.is_own_backup(move.sources[0])]
        yield from self._fill([move for move in moves if move not in uploads], self._copy)
        yield from self._fill(uploads, self._upload)

    def _fill(
        self, moves: list[Move], bring: Callable[[list[Move]], dict[int, str]]
    ) -> Iterator[Filled]:
        if not moves:
            return
        started = time.monotonic()
        try:
            failures: dict[int, str | None] = bring(moves)  # by slot
        except HeapError as error:
            failures = {move.slot: str(error) for move in moves}
        brought = [move for move in moves if move.slot not in failures]
        found = self._check.of([move.slot for move in brought])
        share_s = (time.monotonic() - started) / len(moves)
        for move, fingerprint in zip(brought, found, strict=True):
            failures[move.slot] = self._check.mismatch(move.expert, fingerprint)
        for move in moves:
            failure = failures[move.slot]
            if failure is None:
                self._bank.holds(move.slot, move.expert)
            else:
                self._bank.clear(move.slot)
            yield move, share_s, failure

    def _copy(self, moves: list[Move]) -> dict[int, str]:
        self._bank.copy_all([(m.slot, m.sources[0].rank, m.sources[0].slot) for m in moves])
        return {}

    def _upload(self, moves: list[Move]) -> dict[int, str]:
        failures = {}

        def mapped() -> Iterator[tuple[int, int, np.ndarray]]:
            for move in moves:
                try:
                    weights = self._reader.fetch(move.expert, move.sources[0])
                    require_shape(self._bank, move.expert, weights)
                except Exception as error:  # any failure of a source means the next source
                    failures[move.slot] = str(error)
                    continue
                yield move.slot, move.expert, weights

        self._bank.write_all(mapped())
        return failures


def require_shape(bank: ExpertBank, expert: int, weights: np.ndarray) -> None:
    """Raises RelocationFailed for weights of another shape than a slot of the bank takes."""
    if weights.shape != bank.layout.expert_shape:
        raise RelocationFailed(
            f"expert {expert} has shape {weights.shape}, expected {bank.layout.expert_shape}"
        )
