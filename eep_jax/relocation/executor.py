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
from eep_jax.relocation.patience import Patience
from eep_jax.relocation.rates import Rates
from eep_jax.relocation.transports import Transport, all_transports

_log = logging.getLogger(__name__)

CHECKPOINT_SOURCE = Source(SourceKind.CHECKPOINT)
FETCH_DEADLINE_MS = 30_000


class Executor:
    """Brings a rank's bank to what its placement says. Belongs to the engine's thread."""

    def __init__(
        self,
        bank: ExpertBank,
        checkpoint: Checkpoint,
        transports: dict[SourceKind, Transport] | None = None,
        beat: Callable[[], None] = lambda: None,
        rates: Rates | None = None,
        fetch_deadline_ms: int = FETCH_DEADLINE_MS,
    ):
        """`beat` is called between experts, and while it waits for a backup or the checkpoint, so
        that a long repair is not taken for a stuck engine. `rates` learn from every fetch.

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
        self.rates = rates or Rates()
        self._patience = Patience(fetch_deadline_ms, beat)
        self.moved: dict[str, int] = {}  # experts written since start, by kind of source
        self.bytes_moved: dict[str, int] = {}

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
                weights = self._fetch(expert, source)
                fetched = time.monotonic()
                self.verify(expert, weights)
            except Exception as error:  # any failure of a source means the next source
                failures.append(f"{_name(source)}: {error}")
                _log.warning("expert %d from %s failed: %s", expert, _name(source), error)
                continue
            self.keep(Move(-1, slot, expert, ()), source, weights, fetched - started)
            return
        raise RelocationFailed(
            f"no source has expert {expert} for slot {slot}: "
            + ("; ".join(failures) or "the plan names none; see cluster.sources")
        )

    def keep(self, move: Move, source: Source, weights: np.ndarray, seconds: float) -> None:
        """Writes what `source` supplied in so many seconds into the move's slot."""
        started, kind = time.monotonic(), source.kind.value
        self._bank.write(move.slot, move.expert, weights)
        self.rates.note(source.kind, weights.nbytes, seconds)
        self.moved[kind] = self.moved.get(kind, 0) + 1
        self.bytes_moved[kind] = self.bytes_moved.get(kind, 0) + weights.nbytes
        _log.info(
            "expert %d into slot %d from %s, read in %.1f ms, written in %.1f ms",
            move.expert,
            move.slot,
            _name(source),
            seconds * 1e3,
            (time.monotonic() - started) * 1e3,
        )

    def measure_memory(self, peers) -> None:
        """Times one copy out of an own slot and one out of a peer's, where nothing was copied yet.

        Call it while no step of this rank runs, and while nobody waits for it.
        """
        for kind, ranks in ((SourceKind.LOCAL, [self._bank.rank]), (SourceKind.PEER, peers)):
            if ranks and not self.rates.known(kind):
                started = time.monotonic()
                copied = self._bank.read_peer(ranks[0], 0)
                self.rates.note(kind, copied.nbytes, time.monotonic() - started)

    def fetch(self, expert: int, source: Source) -> np.ndarray:
        """What a source says the expert is; see `verify`. May hang."""
        return self._transports[source.kind].fetch(expert, source)

    def is_in_memory(self, source: Source) -> bool:
        """Whether fetching from it is a copy within this host, which takes no time to speak of."""
        if source.kind is SourceKind.PEER:
            return self._bank.is_mapped(source.rank)
        return source.kind is SourceKind.LOCAL

    def _fetch(self, expert: int, source: Source) -> np.ndarray:
        if self.is_in_memory(source):
            return self.fetch(expert, source)  # memory does not hang
        key = (source.kind.value, source.rank)
        return self._patience.run(key, lambda: self.fetch(expert, source))

    def verify(self, expert: int, weights: np.ndarray) -> None:
        """Compares with the manifest, whose digests are of the stored dtype."""
        if weights.shape != self._bank.layout.expert_shape:
            raise RelocationFailed(
                f"expert {expert} has shape {weights.shape}, not {self._bank.layout.expert_shape}"
            )
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
