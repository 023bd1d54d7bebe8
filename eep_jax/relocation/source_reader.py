"""Reading of one expert from one source: a slot, a backup, or the store of all experts."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from eep_jax.models.expert_bank import ExpertBank
from eep_jax.placement.placement import Placement
from eep_jax.placement.sources import Backup, Source, SourceKind
from eep_jax.storage.expert_store import ExpertStore


@runtime_checkable
class Backups(Protocol):
    """Backups of this and other ranks, in host memory; see `backup_store.BackupStore`."""

    def fetch(self, expert: int, source: Source) -> np.ndarray:
        """The weights `[L 3 F D]` in the stored dtype, unchecked and not to be written to.

        May block. Any exception means that the next source is tried.
        """


class NoBackups:
    """Backups of a rank that keeps and reads none, because of `problem`."""

    def __init__(self, problem: str = "this rank reads no backups; set cluster.backup_bytes"):
        self.offer = Backup(problem=problem)

    def follow(self, ranks: Sequence[int], placement: Placement) -> None:
        """Does nothing: there is nothing to fill."""

    def fetch(self, expert: int, source: Source) -> np.ndarray:
        raise LookupError(self.offer.problem)


class SourceReader:
    """Reads from any source of a move, for one rank."""

    def __init__(self, bank: ExpertBank, store: ExpertStore, backups: Backups | None):
        self._bank, self._store, self._backups = bank, store, backups or NoBackups()

    def fetch(self, expert: int, source: Source) -> np.ndarray:
        """The weights `[L 3 F D]` in host memory, unchecked, in a dtype that the bank can hold.

        Blocks as storage and networks do, unless the source `is_in_memory`. Any exception means
        that the next source is tried.
        """
        match source.kind:
            case SourceKind.CHECKPOINT:
                return self._store.read_experts([expert])[expert]
            case SourceKind.BACKUP:
                return self._backups.fetch(expert, source)
            case SourceKind.PEER:
                return self._bank.read_peer(source.rank, source.slot)
        if (found := self._bank.contents[source.slot]) != expert:
            raise LookupError(f"slot {source.slot} holds {found}")
        return self._bank.read(source.slot)

    def is_in_memory(self, source: Source) -> bool:
        """Whether it is a slot in memory of this host, from which reading is a memory copy."""
        if source.kind is SourceKind.PEER:
            return self._bank.is_mapped(source.rank)
        return source.kind is SourceKind.LOCAL

    def is_own_backup(self, source: Source) -> bool:
        return source.kind is SourceKind.BACKUP and source.rank == self._bank.rank


def key_of(source: Source) -> tuple[str, int]:
    """What hangs together: one disk, or one other rank."""
    return source.kind.value, source.rank


def describe(source: Source) -> str:
    """`peer rank 1 slot 2`, or `checkpoint`."""
    slot = f" rank {source.rank} slot {source.slot}" if source.rank >= 0 else ""
    return source.kind.value + slot
