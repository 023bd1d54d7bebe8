"""Ways to get one expert's bytes, behind one verb."""

from typing import Protocol, runtime_checkable

import numpy as np

from eep_jax.models.expert_bank import ExpertBank
from eep_jax.placement.sources import Source, SourceKind
from eep_jax.storage.expert_store import ExpertStore


@runtime_checkable
class Transport(Protocol):
    """Reads an expert from one kind of source. Any exception means: try the next source."""

    def fetch(self, expert: int, source: Source) -> np.ndarray:
        """The expert's weights in host memory, `[L 3 F D]`, in a dtype that the bank can hold.

        Nobody else may change them; whether they are right is for the caller to check.
        """


class LocalCopy:
    """From another slot of the same rank."""

    def __init__(self, bank: ExpertBank):
        self._bank = bank

    def fetch(self, expert: int, source: Source) -> np.ndarray:
        if self._bank.contents[source.slot] != expert:
            raise LookupError(f"slot {source.slot} holds {self._bank.contents[source.slot]}")
        return self._bank.read(source.slot)


class PeerCopy:
    """From the bank of another rank, over the heap."""

    def __init__(self, bank: ExpertBank):
        self._bank = bank

    def fetch(self, expert: int, source: Source) -> np.ndarray:
        return self._bank.read_peer(source.rank, source.slot)


class StoreCopy:
    """From the store of all experts; only this expert is read."""

    def __init__(self, store: ExpertStore):
        self._store = store

    def fetch(self, expert: int, source: Source) -> np.ndarray:
        return self._store.read_experts([expert])[expert]


class NoBackups:
    """Where a rank was configured without backups."""

    def fetch(self, expert: int, source: Source) -> np.ndarray:
        raise LookupError("this rank reads no backups; set cluster.backup_bytes")


def all_transports(
    bank: ExpertBank, store: ExpertStore, backups: Transport
) -> dict[SourceKind, Transport]:
    return {
        SourceKind.LOCAL: LocalCopy(bank),
        SourceKind.PEER: PeerCopy(bank),
        SourceKind.BACKUP: backups,
        SourceKind.CHECKPOINT: StoreCopy(store),
    }
