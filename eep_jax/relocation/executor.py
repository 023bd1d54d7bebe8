"""Carries out a Plan's moves on one rank: fetch, check the digest, write, or try the next."""

import logging
import time
from collections.abc import Callable

import numpy as np

from eep_jax.errors import RelocationFailed
from eep_jax.models.expert_bank import ExpertBank
from eep_jax.models.weights import expert_name
from eep_jax.placement.placement import EMPTY
from eep_jax.placement.planner import Move
from eep_jax.placement.sources import Source, SourceKind
from eep_jax.relocation.checkpoint import Checkpoint, digest
from eep_jax.relocation.transports import Transport, all_transports

_log = logging.getLogger(__name__)

CHECKPOINT_SOURCE = Source(SourceKind.CHECKPOINT)


class Executor:
    """Brings a rank's bank to what its placement says. Belongs to the engine's thread."""

    def __init__(
        self,
        bank: ExpertBank,
        checkpoint: Checkpoint,
        transports: dict[SourceKind, Transport] | None = None,
        beat: Callable[[], None] = lambda: None,
    ):
        """`beat` is called between experts, so a long repair is not taken for a stuck engine.

        Raises ValueError if the bank's dtype cannot hold all values of the checkpoint's: digests
        are of stored bytes, and could never be compared.
        """
        self._stored_dtype = np.dtype(checkpoint.manifest["dtype"])
        if not np.can_cast(self._stored_dtype, bank.dtype):
            raise ValueError(
                f"a bank of {bank.dtype} cannot hold the experts of {checkpoint.root}, which are "
                f"{self._stored_dtype}; convert the checkpoint or choose a wider dtype"
            )
        self._bank, self._checkpoint, self._beat = bank, checkpoint, beat
        self._transports = transports or all_transports(bank, checkpoint)
        self.moved: dict[str, int] = {}  # experts written since start, by kind of source

    def carry_out(self, slots: tuple[int, ...], moves: tuple[Move, ...]) -> tuple[int, ...]:
        """Makes the bank hold `slots` (expert per slot, EMPTY for none); returns its contents.

        What a slot already holds is not fetched again, so carrying out the same plan twice, or a
        plan after an abandoned one, moves only what is missing. Slots not named by a move fall back
        to the checkpoint. Raises RelocationFailed where no source of an expert works; what was
        written before stays.
        """
        planned = {move.slot: move for move in moves}
        for slot, expert in enumerate(slots):
            if expert == EMPTY or self._bank.contents[slot] == expert:
                continue
            move = planned.get(slot)
            usable = move is not None and move.expert == expert
            self._fill(slot, expert, move.sources if usable else (CHECKPOINT_SOURCE,))
            self._beat()
        for slot, expert in enumerate(slots):
            if expert == EMPTY:
                self._bank.clear(slot)
        return self._bank.contents

    def _fill(self, slot: int, expert: int, sources: tuple[Source, ...]) -> None:
        failures = []
        for source in sources:
            started = time.monotonic()
            try:
                weights = self._transports[source.kind].fetch(expert, source)
                self._verify(expert, weights)
            except Exception as error:  # any failure of a source means the next source
                failures.append(f"{_name(source)}: {error}")
                _log.warning("expert %d from %s failed: %s", expert, _name(source), error)
                continue
            self._bank.write(slot, expert, weights)
            self.moved[source.kind.value] = self.moved.get(source.kind.value, 0) + 1
            milliseconds = (time.monotonic() - started) * 1e3
            _log.info(
                "expert %d into slot %d from %s, %.1f ms", expert, slot, _name(source), milliseconds
            )
            return
        raise RelocationFailed(
            f"no source has expert {expert} for slot {slot}: " + "; ".join(failures)
        )

    def _verify(self, expert: int, weights: np.ndarray) -> None:
        """Compares with the manifest, whose digests are of the stored dtype."""
        narrow = weights.astype(self._stored_dtype, copy=False)
        found, expected = digest(narrow), self._checkpoint.manifest["experts"][expert_name(expert)]
        if found != expected:
            raise RelocationFailed(f"digest {found} of expert {expert}, expected {expected}")
        # Narrowing rounds, so the digest alone does not see damage in the low bits.
        if narrow.dtype != weights.dtype and not np.array_equal(
            narrow.astype(weights.dtype), weights
        ):
            raise RelocationFailed(f"expert {expert} has bits that its stored dtype cannot hold")


def _name(source: Source) -> str:
    place = f" rank {source.rank} slot {source.slot}" if source.rank >= 0 else ""
    return source.kind.value + place
