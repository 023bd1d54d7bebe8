"""Carries out a Plan's moves on one rank: fetch, check the digest, write, or try the next."""

import dataclasses
import logging
import math
import time
from collections.abc import Callable

import numpy as np

from eep_jax.errors import RelocationFailed
from eep_jax.models.expert_bank import ExpertBank
from eep_jax.models.weights import expert_name
from eep_jax.placement.placement import EMPTY
from eep_jax.placement.planner import Move
from eep_jax.placement.sources import Source, SourceKind
from eep_jax.relocation.fetch_ahead import Prefetcher
from eep_jax.relocation.patience import DeadlineRunner, Pending
from eep_jax.relocation.placing import Placing, is_in_memory, require_shape
from eep_jax.relocation.rates import Rates
from eep_jax.relocation.slot_check import SlotCheck
from eep_jax.relocation.transports import Transport, all_transports
from eep_jax.storage.block_loader import BlockLoader, Job
from eep_jax.storage.checkpoint import Checkpoint
from eep_jax.storage.digests import digest_like

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
        fetches_at_once: int = 1,
    ):
        """`beat` is called between experts, and while it waits for a backup or the checkpoint, so
        that a long repair is not taken for a stuck engine. `rates` learn from every fetch. With a
        `check`, what a slot holds is found out on the device, and slots are copied inside the heap.
        From storage and networks `fetches_at_once` experts come at a time.

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
        self._patience, self._check = DeadlineRunner(fetch_deadline_ms, beat), check
        self._fetches_at_once = fetches_at_once
        self._loader = BlockLoader(fetch_deadline_ms, beat)
        stored_bytes = bank.expert_bytes // bank.dtype.itemsize * self._stored_dtype.itemsize
        self._placing = Placing(bank, check, self.fetch, stored_bytes, self._note)
        self.moved: dict[str, int] = {}  # experts written since start, by kind of source
        self.bytes_moved: dict[str, int] = {}

    def carry_out(self, slots: tuple[int, ...], moves: tuple[Move, ...]) -> tuple[int, ...]:
        """Makes the bank hold `slots` (expert per slot, EMPTY for none); returns its contents.

        What a slot already holds is not fetched again, so carrying out the same plan twice, or a
        plan after an abandoned one, moves only what is missing. Slots not named by a move fall back
        to the checkpoint. Raises RelocationFailed where no source of an expert works, after all
        others were brought; it names those that are missing.
        """
        planned = {move.slot: move for move in moves}
        wanted, lost = [], {}
        for slot, expert in enumerate(slots):
            if expert == EMPTY or self._bank.contents[slot] == expert:
                continue
            move = planned.get(slot)
            usable = move is not None and move.expert == expert
            sources = move.sources if usable else (CHECKPOINT_SOURCE,)
            if self._loader.may_still_write(self._bank.target(slot)):
                lost[expert] = f"a read that hangs may still come into slot {slot}"
                continue
            wanted.append(Move(self._bank.rank, slot, expert, sources))
        failed = {}
        if placeable := [move for move in wanted if self._placing.can(move)]:
            failed = self._placing.place(placeable)
            self._beat()
        left = [m for m in wanted if self._bank.contents[m.slot] != m.expert]
        ahead = self._fetch_ahead(left, failed)
        # What is copied goes first: its source may be a slot that another expert is loaded into.
        loaded = [m for m in left if m.slot not in failed and self._loads(*m.sources[:1])]
        lost |= self._fill_all([m for m in left if m not in loaded], failed, ahead)
        failed = self._load_together(loaded)
        lost |= self._fill_all([m for m in loaded if m.slot in failed], failed, ahead)
        for slot, expert in enumerate(slots):
            if expert == EMPTY:
                self._bank.clear(slot)
        if lost:
            raise RelocationFailed("; ".join(lost.values()), lost)
        return self._bank.contents

    def _fill_all(
        self, moves: list[Move], failed: dict[int, str], ahead: Prefetcher
    ) -> dict[int, str]:
        """One after the other; why not, by expert, where no source works."""
        lost = {}
        for move in moves:
            try:
                self._fill(move, failed.get(move.slot), ahead)
            except RelocationFailed as error:
                lost[move.expert] = str(error)
            self._beat()
        return lost

    def place(self, move: Move, source: Source) -> bool:
        """Brings an expert out of this host's memory, if its slot can be checked; else False.

        Raises RelocationFailed where the copy is not what it should be.
        """
        only = dataclasses.replace(move, sources=(source,))
        if not self._placing.can(only):
            return False
        if failures := self._placing.place([only]):
            raise RelocationFailed(failures[move.slot])
        return True

    def _fetch_ahead(self, moves: list[Move], failed: dict[int, str]) -> Prefetcher:
        """Of those whose next source is storage or a network, and answers as a whole."""
        following = [(m.expert, m.sources[m.slot in failed :][:1]) for m in moves]
        wanted = [
            (expert, source)
            for expert, sources in following
            for source in sources
            if not (self.is_in_memory(source) or self._loads(source))
        ]
        return Prefetcher(wanted, self._begin_fetch, _key, self._fetches_at_once)

    def _fill(self, move: Move, failed: str | None, ahead: Prefetcher) -> None:
        """From one source after the other; `failed` says why the first one is not tried again."""
        failures = [] if failed is None else [f"{name_of(move.sources[0])}: {failed}"]
        if failures:
            _log.warning("expert %d from %s", move.expert, failures[0])
        for source in move.sources[len(failures) :]:
            try:
                if self.place(move, source):
                    return
                if self._loads(source):
                    self._load(move, in_place=source is move.sources[-1])
                    return
                weights, seconds = self._fetch(move.expert, source, ahead)
                written = time.monotonic()
                self._write_checked(move, weights)
            except Exception as error:  # any failure of a source means the next source
                failures.append(f"{name_of(source)}: {error}")
                _log.warning("expert %d from %s failed: %s", move.expert, name_of(source), error)
                continue
            self._note(move, source, weights.nbytes, seconds + time.monotonic() - written)
            return
        raise RelocationFailed(
            f"no source has expert {move.expert} for slot {move.slot}: "
            + ("; ".join(failures) or "the plan names none; see cluster.sources")
        )

    def _loads(self, source: Source | None = None) -> bool:
        """Whether it is a checkpoint that is read block by block, straight into a slot."""
        if source is None or source.kind is not SourceKind.CHECKPOINT:
            return False
        job_of = getattr(self._checkpoint, "expert_job", None)
        return job_of is not None and job_of(0, self._bank.target(0), False) is not None

    def _job(self, move: Move, in_place: bool) -> Job | None:
        target = self._bank.target(move.slot)
        return self._checkpoint.expert_job(move.expert, target, in_place)

    def _load(self, move: Move, in_place: bool) -> None:
        # A read that hangs, and is given up, may come later: not where another source goes on.
        if failures := self._load_together([move], in_place):
            raise RelocationFailed(failures[move.slot])

    def _load_together(self, moves: list[Move], in_place: bool = False) -> dict[int, str]:
        """Loads from the checkpoint, by several threads; why not, by slot, where one failed.

        A slot that failed holds nothing.
        """
        jobs, failures, started = {}, {}, time.monotonic()
        for move in moves:
            self._bank.begin(move.slot)
            jobs[self._job(move, in_place or len(move.sources) == 1)] = move
        for job in self._loader.load(list(jobs)):
            move = jobs[job]
            if job.error is not None:
                failures[move.slot] = str(job.error)
                continue
            self._bank.holds(move.slot, move.expert)
            self._learn(move)
            self._beat()
        stored_bytes = math.prod(self._bank.layout.expert_shape) * self._stored_dtype.itemsize
        for move in [m for m in moves if m.slot not in failures]:
            share_s = (time.monotonic() - started) / len(moves)
            self._note(move, CHECKPOINT_SOURCE, stored_bytes, share_s)
        return failures

    def _write_checked(self, move: Move, weights: np.ndarray) -> None:
        """Writes what `_fetch` returned, and looks at the slot if that is what is left to do."""
        known = None if self._check is None else self._check.known(move.expert)
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
            name_of(source),
            seconds * 1e3,
        )

    def measure_memory(self, peers) -> None:
        """Times one copy of an own slot and one of a peer's, where nothing was copied yet.

        The way they would go: where slots can be checked, into one that holds nothing, if there is
        one; else out of the heap. Call it while no step of this rank runs, and while nobody waits.
        """
        for kind, ranks in ((SourceKind.LOCAL, [self._bank.rank]), (SourceKind.PEER, peers)):
            if not ranks or self.rates.known(kind):
                continue
            started = time.monotonic()
            if self._copy_once(ranks[0]):
                self.rates.note(kind, self._bank.expert_bytes, time.monotonic() - started)

    def _copy_once(self, rank: int) -> bool:
        if self._check is None or not self._bank.is_mapped(rank):
            self._bank.read_peer(rank, 0)
            return True
        empty = [slot for slot, expert in enumerate(self._bank.contents) if expert == EMPTY]
        others = [slot for slot in range(len(self._bank.contents)) if slot not in empty[:1]]
        if empty and others:
            self._bank.copy_all([(empty[0], rank, others[0])])
            return True
        return False

    def fetch(self, expert: int, source: Source) -> np.ndarray:
        """What a source says the expert is; see `verify`. May hang."""
        return self._transports[source.kind].fetch(expert, source)

    def is_in_memory(self, source: Source) -> bool:
        """Whether fetching from it is a copy within this host, which takes no time to speak of."""
        return is_in_memory(self._bank, source)

    def _fetch(self, expert: int, source: Source, ahead: Prefetcher) -> tuple[np.ndarray, float]:
        """(weights, seconds). Of the right digest, or the expert's fingerprint is known.

        Where a slot can be checked, the host reads nothing.
        """
        if not self.is_in_memory(source):
            return ahead.take(expert, source, self._patience.wait)
        started = time.monotonic()
        weights = self._fetch_right(expert, source, self._is_unknown(expert))
        return weights, time.monotonic() - started  # memory does not hang

    def _begin_fetch(self, expert: int, source: Source) -> Pending:
        is_unknown = self._is_unknown(expert)
        return self._patience.begin(
            _key(source), lambda: self._fetch_right(expert, source, is_unknown)
        )

    def _fetch_right(self, expert: int, source: Source, is_unknown: bool) -> np.ndarray:
        weights = self.fetch(expert, source)
        if is_unknown:
            self.verify(expert, weights, source)
        return weights

    def _is_unknown(self, expert: int) -> bool:
        return self._check is None or self._check.known(expert) is None

    def verify(self, expert: int, weights: np.ndarray, source: Source) -> None:
        """Compares with the manifest, whose digests are of the stored dtype.

        What comes from the checkpoint was compared there, as far as it has digests.
        """
        require_shape(self._bank, expert, weights)
        if source.kind is SourceKind.CHECKPOINT:
            return
        narrow = weights.astype(self._stored_dtype, copy=False)
        expected = self._checkpoint.manifest["experts"][expert_name(expert)]
        found = digest_like(expected, narrow)
        if found != expected:
            raise RelocationFailed(f"digest {found} of expert {expert}, expected {expected}")
        # Narrowing rounds, so the digest alone does not see damage in the low bits.
        if narrow.dtype != weights.dtype and not np.array_equal(
            narrow.astype(weights.dtype), weights
        ):
            raise RelocationFailed(f"expert {expert} has bits that its stored dtype cannot hold")


def _key(source: Source) -> tuple[str, int]:
    """What hangs together: one disk, or one other rank."""
    return source.kind.value, source.rank


def name_of(source: Source) -> str:
    place = f" rank {source.rank} slot {source.slot}" if source.rank >= 0 else ""
    return source.kind.value + place
