"""Carries out a Plan's moves on one rank: fetch, check the digest, write, or try the next."""

import dataclasses
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
from eep_jax.relocation.slot_check import SlotCheck
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
        check: SlotCheck | None = None,
    ):
        """`beat` is called between experts, and while it waits for a backup or the checkpoint, so
        that a long repair is not taken for a stuck engine. `rates` learn from every fetch. With a
        `check`, what a slot holds is found out on the device, and slots are copied inside the heap.

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
        self._patience, self._check = Patience(fetch_deadline_ms, beat), check
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
        wanted = []
        for slot, expert in enumerate(slots):
            if expert == EMPTY or self._bank.contents[slot] == expert:
                continue
            move = planned.get(slot)
            usable = move is not None and move.expert == expert
            sources = move.sources if usable else (CHECKPOINT_SOURCE,)
            wanted.append(Move(self._bank.rank, slot, expert, sources))
        failed = self._place_together([m for m in wanted if self._can_place(m)])
        for move in wanted:
            if self._bank.contents[move.slot] != move.expert:
                self._fill(move, failed.get(move.slot))
                self._beat()
        for slot, expert in enumerate(slots):
            if expert == EMPTY:
                self._bank.clear(slot)
        return self._bank.contents

    def place(self, move: Move, source: Source) -> bool:
        """Copies an expert inside the heap, where that can be checked; False where it cannot.

        Raises RelocationFailed where the copy is not what it should be.
        """
        only = dataclasses.replace(move, sources=(source,))
        if not self._can_place(only):
            return False
        if failures := self._place_together([only]):
            raise RelocationFailed(failures[move.slot])
        return True

    def _can_place(self, move: Move) -> bool:
        """Whether the first source is a slot, and its copy can be checked where it lands."""
        if self._check is None or not move.sources or not self.is_in_memory(move.sources[0]):
            return False
        source, contents = move.sources[0], self._bank.contents
        is_there = source.kind is SourceKind.PEER or contents[source.slot] == move.expert
        return is_there and self._check.known(move.expert) is not None

    def _place_together(self, moves: list[Move]) -> dict[int, str]:
        """Copies from first sources, all at once; why not, by slot, where one is not right.

        A slot that is not right holds nothing.
        """
        if not moves:
            return {}
        started, failures = time.monotonic(), {}
        self._bank.copy_all([(m.slot, m.sources[0].rank, m.sources[0].slot) for m in moves])
        found = self._check.of([move.slot for move in moves])
        share_s = (time.monotonic() - started) / len(moves)
        for move, fingerprint in zip(moves, found, strict=True):
            source, expected = move.sources[0], self._check.known(move.expert)
            if fingerprint == expected:
                self._bank.holds(move.slot, move.expert)
                self._note(move, source, self._bank.expert_bytes, share_s)
                continue
            failures[move.slot] = (
                f"fingerprint {fingerprint} of expert {move.expert}, expected {expected}"
            )
        self._beat()
        return failures

    def _fill(self, move: Move, failed: str | None) -> None:
        """From one source after the other; `failed` says why the first one is not tried again."""
        failures = [] if failed is None else [f"{_name(move.sources[0])}: {failed}"]
        if failures:
            _log.warning("expert %d from %s", move.expert, failures[0])
        for source in move.sources[len(failures) :]:
            started = time.monotonic()
            try:
                if self.place(move, source):
                    return
                if self._streams(source):
                    self._stream(move, source)
                    return
                weights = self._fetch(move.expert, source)
                self._write_checked(move, weights, source)
            except Exception as error:  # any failure of a source means the next source
                failures.append(f"{_name(source)}: {error}")
                _log.warning("expert %d from %s failed: %s", move.expert, _name(source), error)
                continue
            self._note(move, source, weights.nbytes, time.monotonic() - started)
            return
        raise RelocationFailed(
            f"no source has expert {move.expert} for slot {move.slot}: "
            + ("; ".join(failures) or "the plan names none; see cluster.sources")
        )

    def _streams(self, source: Source) -> bool:
        return source.kind is SourceKind.CHECKPOINT and hasattr(self._checkpoint, "iter_expert")

    def _stream(self, move: Move, source: Source) -> None:
        """Writes an expert part by part as it is read, so that no more than a part is in memory."""
        started, parts = time.monotonic(), self._checkpoint.iter_expert(move.expert)
        key, end = (source.kind.value, source.rank), object()
        patient = lambda: self._patience.run(key, lambda: next(parts, end))
        nbytes = self._bank.write_parts(move.slot, move.expert, iter(patient, end))
        self._learn(move)
        self._note(move, source, nbytes, time.monotonic() - started)

    def _write_checked(self, move: Move, weights: np.ndarray, source: Source) -> None:
        """Writes what a source supplied. Where the slot can be checked, the host reads nothing."""
        known = None if self._check is None else self._check.known(move.expert)
        if known is None:
            self.verify(move.expert, weights, source)
        self._bank.write(move.slot, move.expert, weights)
        if known is None:
            self._learn(move)
        elif (found := self._check.of([move.slot])[0]) != known:
            self._bank.clear(move.slot)
            raise RelocationFailed(f"fingerprint {found} of expert {move.expert}, expected {known}")

    def _learn(self, move: Move) -> None:
        if self._check is not None:
            self._check.learn(move.expert, move.slot)

    def keep(self, move: Move, source: Source, weights: np.ndarray, seconds: float) -> None:
        """Writes what `source` supplied in so many seconds, and `verify` found right."""
        self._bank.write(move.slot, move.expert, weights)
        self._learn(move)
        self._note(move, source, weights.nbytes, seconds)

    def _note(self, move: Move, source: Source, nbytes: int, seconds: float) -> None:
        """An expert is in its slot, and it took so long to bring, check and write it."""
        kind = source.kind.value
        self.rates.note(source.kind, nbytes, seconds)
        self.moved[kind] = self.moved.get(kind, 0) + 1
        self.bytes_moved[kind] = self.bytes_moved.get(kind, 0) + nbytes
        _log.info(
            "expert %d into slot %d from %s in %.1f ms",
            move.expert,
            move.slot,
            _name(source),
            seconds * 1e3,
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

    def verify(self, expert: int, weights: np.ndarray, source: Source) -> None:
        """Compares with the manifest, whose digests are of the stored dtype.

        What comes from the checkpoint was compared there, as far as it has digests.
        """
        if weights.shape != self._bank.layout.expert_shape:
            raise RelocationFailed(
                f"expert {expert} has shape {weights.shape}, not {self._bank.layout.expert_shape}"
            )
        if source.kind is SourceKind.CHECKPOINT:
            return
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
