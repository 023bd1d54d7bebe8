"""Experts that are in this host's memory already: brought into slots together, and checked there.

From slots of the own rank and of mapped peers they are copied inside the heap, from the own backups
uploaded. All are on their way before one is waited for, and no byte of them is read by the host:
what a slot holds is compared with the fingerprint of its expert.
"""

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from eep_jax.errors import HeapError, RelocationFailed
from eep_jax.models.expert_bank import ExpertBank
from eep_jax.placement.planner import Move
from eep_jax.placement.sources import Source, SourceKind
from eep_jax.relocation.slot_check import SlotCheck

Note = Callable[[Move, Source, int, float], None]  # an expert came: from where, bytes, seconds


class Placing:
    """Carries out moves by their first sources. Of the engine's thread."""

    def __init__(
        self,
        bank: ExpertBank,
        check: SlotCheck | None,
        backup_of: Callable[[int, Source], np.ndarray],
        stored_bytes: int,
        note: Note,
    ):
        """`backup_of` maps an own backup, of `stored_bytes`; `note` hears of every success."""
        self._bank, self._check, self._backup_of = bank, check, backup_of
        self._stored_bytes, self._note = stored_bytes, note

    def can(self, move: Move) -> bool:
        """Whether the first source is here, and what it supplies can be checked in the slot."""
        if self._check is None or not move.sources:
            return False
        source = move.sources[0]
        is_there = is_in_memory(self._bank, source) or self._is_own_backup(source)
        if source.kind is SourceKind.LOCAL:
            is_there = self._bank.contents[source.slot] == move.expert
        return is_there and self._check.known(move.expert) is not None

    def place(self, moves: Sequence[Move]) -> dict[int, str]:
        """Brings all of these, which it `can`; why not, by slot, where one is not right.

        A slot that is not right holds nothing.
        """
        uploads = [move for move in moves if self._is_own_backup(move.sources[0])]
        copies = [move for move in moves if move not in uploads]
        failed = self._placed(copies, self._copy, self._bank.expert_bytes)
        return failed | self._placed(uploads, self._upload, self._stored_bytes)

    def _is_own_backup(self, source: Source) -> bool:
        return source.kind is SourceKind.BACKUP and source.rank == self._bank.rank

    def _placed(
        self, moves: list[Move], bring: Callable[[list[Move]], dict[int, str]], nbytes: int
    ) -> dict[int, str]:
        if not moves:
            return {}
        started = time.monotonic()
        try:
            failures = bring(moves)
        except HeapError as error:
            failures = {move.slot: str(error) for move in moves}
        brought = [move for move in moves if move.slot not in failures]
        found = self._check.of([move.slot for move in brought])
        share_s = (time.monotonic() - started) / len(moves)
        for move, fingerprint in zip(brought, found, strict=True):
            if fingerprint == (expected := self._check.known(move.expert)):
                self._bank.holds(move.slot, move.expert)
                self._note(move, move.sources[0], nbytes, share_s)
            else:
                failures[move.slot] = (
                    f"fingerprint {fingerprint} of expert {move.expert}, expected {expected}"
                )
        for slot in failures:
            self._bank.clear(slot)
        return failures

    def _copy(self, moves: list[Move]) -> dict[int, str]:
        self._bank.copy_all([(m.slot, m.sources[0].rank, m.sources[0].slot) for m in moves])
        return {}

    def _upload(self, moves: list[Move]) -> dict[int, str]:
        failures = {}

        def mapped() -> Iterator[tuple[int, int, np.ndarray]]:
            for move in moves:
                try:
                    weights = self._backup_of(move.expert, move.sources[0])
                    require_shape(self._bank, move.expert, weights)
                except Exception as error:  # any failure of a source means the next source
                    failures[move.slot] = str(error)
                    continue
                yield move.slot, move.expert, weights

        self._bank.write_all(mapped())
        return failures


def is_in_memory(bank: ExpertBank, source: Source) -> bool:
    """Whether it is a slot of this host."""
    if source.kind is SourceKind.PEER:
        return bank.is_mapped(source.rank)
    return source.kind is SourceKind.LOCAL


def require_shape(bank: ExpertBank, expert: int, weights: np.ndarray) -> None:
    """Raises RelocationFailed for weights of another shape than a slot of the bank takes."""
    if weights.shape != bank.layout.expert_shape:
        raise RelocationFailed(
            f"expert {expert} has shape {weights.shape}, not {bank.layout.expert_shape}"
        )
