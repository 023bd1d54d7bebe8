"""Filling of a rank's slots according to a plan: fetch, check and write, or try the next source."""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from eep_jax.errors import RelocationFailed
from eep_jax.models.expert_bank import ExpertBank
from eep_jax.models.weights import expert_name
from eep_jax.placement.placement import EMPTY
from eep_jax.placement.planner import Move
from eep_jax.placement.sources import Source, SourceKind
from eep_jax.relocation.rates import Rates
from eep_jax.relocation.slot_check import SlotCheck
from eep_jax.relocation.slot_copier import Filled, SlotCopier, require_shape
from eep_jax.relocation.source_reader import Backups, SourceReader, describe, key_of
from eep_jax.storage.block_loader import BlockLoader
from eep_jax.storage.digests import digest_like
from eep_jax.storage.expert_store import ExpertStore
from eep_jax.storage.fetcher import Fetch, Fetcher, Prefetcher

_log = logging.getLogger(__name__)

CHECKPOINT_SOURCE = Source(SourceKind.CHECKPOINT)
_IN_HEAP = (SourceKind.LOCAL, SourceKind.PEER)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FetchOptions:
    """How an Executor fetches.

    Attributes:
        deadline_ms: Time for one expert, after which its next source is tried.
        at_once: Number of experts to fetch from storage and networks at a time.
        beat: Called between experts and while the executor waits, so that the supervisor does not
            take a long repair for a stuck engine.
        rates: Collects the speed of every fetch.
    """

    deadline_ms: int = 30_000
    at_once: int = 1
    beat: Callable[[], None] = lambda: None
    rates: Rates = dataclasses.field(default_factory=Rates)


class Executor:
    """Fills a rank's bank according to its placement. Call from the engine thread only."""

    def __init__(
        self,
        bank: ExpertBank,
        store: ExpertStore,
        backups: Backups | None = None,
        check: SlotCheck | None = None,
        options: FetchOptions | None = None,
    ):
        """Opens no file and reads nothing yet.

        Args:
            bank: The rank's slots.
            store: Holds all experts; the source of last resort.
            backups: Reads backups of this and other ranks; None if there are none.
            check: Computes fingerprints of slots on the device. With it, slots are copied inside
                the heap; without it, the host compares every expert with its digest.
            options: Deadline, concurrency and observers.

        Raises:
            ValueError: The bank's dtype cannot hold all values of the store's. Digests are of
                stored bytes, and could never be compared.
        """
        self._stored_dtype = np.dtype(store.manifest["dtype"])
        if not np.can_cast(self._stored_dtype, bank.dtype):
            raise ValueError(
                f"a bank of {bank.dtype} cannot hold the experts of {store.root}, which are "
                f"{self._stored_dtype}; convert the checkpoint or choose a wider dtype"
            )
        self._bank, self._store, self._check = bank, store, check
        self._options = options or FetchOptions()
        self._beat, self.rates = self._options.beat, self._options.rates
        self._reader = SourceReader(bank, store, backups)
        self._copier = SlotCopier(bank, check, self._reader)
        self.fetcher = Fetcher(self._options.deadline_ms, self._beat)
        self._loader = BlockLoader(self.fetcher, key_of(CHECKPOINT_SOURCE))
        self.moved: dict[str, int] = {}  # experts written since start, by kind of source
        self.bytes_moved: dict[str, int] = {}

    def carry_out(self, slots: tuple[int, ...], moves: tuple[Move, ...]) -> tuple[int, ...]:
        """Makes the bank hold `slots`.

        An expert that its slot already holds is not fetched again, so carrying out the same plan
        twice, or a plan after an abandoned one, moves only what is missing.

        Args:
            slots: The expert of each slot, EMPTY for none.
            moves: Where to take experts from; slots without a move use the checkpoint.

        Returns:
            The bank's contents, equal to `slots`.

        Raises:
            RelocationFailed: No source of some experts works. All others are in their slots;
                `lost` names the missing ones with reasons.
        """
        wanted, lost = self._missing(slots, moves)
        failed = self._settle(self._copier.fill([m for m in wanted if self._copier.can(m)]))
        self._beat()
        left = [m for m in wanted if self._bank.contents[m.slot] != m.expert]
        ahead = self._prefetcher(left, failed)
        # Copies go first: their source may be a slot that another expert is loaded into.
        streamed = [
            m for m in left if m.slot not in failed and any(map(self._streams, m.sources[:1]))
        ]
        lost |= self._fill_all([m for m in left if m not in streamed], failed, ahead)
        failed = self._settle(self._stream(streamed))
        lost |= self._fill_all([m for m in streamed if m.slot in failed], failed, ahead)
        for slot, expert in enumerate(slots):
            if expert == EMPTY:
                self._bank.clear(slot)
        if lost:
            raise RelocationFailed("; ".join(lost.values()), lost)
        return self._bank.contents

    def fill(
        self, move: Move, ahead: Prefetcher | None = None, failed: str | None = None
    ) -> Iterator[Fetch]:
        """Fills a slot from the first source that works. Resume it once the yielded fetch is over.

        Args:
            move: The slot, its expert and the sources.
            ahead: Fetches of a repair. None while steps run: then storage is not read into the
                slot itself, and every digest is computed in a thread.
            failed: Why the first source already failed, if it did.

        Raises:
            RelocationFailed: No source works; the message names each with its reason.
        """
        failures = [] if failed is None else [_failure(move, failed)]
        for index in range(len(failures), len(move.sources)):
            rest = dataclasses.replace(move, sources=move.sources[index:])
            try:
                yield from self._fill_from_first(rest, ahead)
                return
            except Exception as error:  # any failure of a source means the next source
                failures.append(_failure(rest, error))
        raise RelocationFailed(
            f"no source has expert {move.expert} for slot {move.slot}: "
            + ("; ".join(failures) or "the plan names none; see cluster.sources")
        )

    def verify(self, expert: int, weights: np.ndarray, source: Source) -> None:
        """Compares weights with the manifest, whose digests are of the stored dtype.

        The store compares its own weights as it reads them, if it has stored digests. Raises
        RelocationFailed if they differ.
        """
        require_shape(self._bank, expert, weights)
        if source.kind is SourceKind.CHECKPOINT:
            return
        narrow = weights.astype(self._stored_dtype, copy=False)
        expected = self._store.manifest["experts"][expert_name(expert)]
        found = digest_like(expected, narrow)
        if found != expected:
            raise RelocationFailed(f"digest {found} of expert {expert}, expected {expected}")
        # Narrowing rounds, so the digest alone misses damage in the low bits.
        if narrow.dtype != weights.dtype and not np.array_equal(
            narrow.astype(weights.dtype), weights
        ):
            raise RelocationFailed(f"expert {expert} has bits that its stored dtype cannot hold")

    def measure_memory(self, peers: Sequence[int]) -> None:
        """Times one copy of an own slot and one of a peer's, for kinds without a measured rate.

        The copy goes into an empty slot if slots can be checked, else out of the heap. Call it
        while no step of this rank runs and no rank waits for it.
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

    def _missing(
        self, slots: tuple[int, ...], moves: tuple[Move, ...]
    ) -> tuple[list[Move], dict[int, str]]:
        """The necessary moves, and {expert: reason} for slots that cannot be filled now."""
        planned = {(move.slot, move.expert): move.sources for move in moves}
        wanted, lost = [], {}
        for slot, expert in enumerate(slots):
            if expert == EMPTY or self._bank.contents[slot] == expert:
                continue
            if self._loader.may_still_write(self._bank.target(slot)):
                lost[expert] = f"a read that hangs may still come into slot {slot}"
                continue
            sources = planned.get((slot, expert), (CHECKPOINT_SOURCE,))
            wanted.append(Move(self._bank.rank, slot, expert, sources))
        return wanted, lost

    def _prefetcher(self, moves: list[Move], failed: dict[int, str]) -> Prefetcher:
        """Fetches from storage and networks, by the source that each move tries next."""
        wanted = [
            (move.expert, source)
            for move in moves
            for source in move.sources[move.slot in failed :][:1]
            if not (self._reader.is_in_memory(source) or self._streams(source))
        ]
        make = lambda each: self._make_fetch(*each)
        return Prefetcher(self.fetcher, wanted, make, self._options.at_once)

    def _fill_all(
        self, moves: list[Move], failed: dict[int, str], ahead: Prefetcher
    ) -> dict[int, str]:
        """Fills one slot after the other. Returns {expert: reason} of failures."""
        lost = {}
        for move in moves:
            try:
                for fetch in self.fill(move, ahead, failed.get(move.slot)):
                    ahead.take(fetch)
            except RelocationFailed as error:
                lost[move.expert] = str(error)
            self._beat()
        return lost

    def _fill_from_first(self, move: Move, ahead: Prefetcher | None) -> Iterator[Fetch]:
        """`fill` from the first source only. Raises whatever fails."""
        source, started = move.sources[0], time.monotonic()
        can_copy = self._copier.can(move)
        if can_copy or (ahead is not None and self._streams(source)):
            filled = self._copier.fill([move]) if can_copy else self._stream([move])
            for failure in self._settle(filled).values():
                raise RelocationFailed(failure)
            return
        if ahead is None or self._reader.is_in_memory(source):
            fetch = self.fetcher.start(self._make_fetch(move.expert, source, verify=ahead is None))
        else:
            fetch = ahead.begin((move.expert, source))
        copy_s = time.monotonic() - started  # from memory; threads do the rest
        yield fetch
        weights, is_verified = fetch.result()
        written = time.monotonic()
        self._write(move, weights, is_verified)
        self._note(move, copy_s + fetch.seconds + time.monotonic() - written)

    def _make_fetch(self, expert: int, source: Source, verify: bool = False) -> Fetch:
        """A fetch of (weights, whether they were compared with their digest), not started.

        The host compares nothing if the slot's fingerprint can be compared, unless `verify`. A slot
        in memory is copied at once: peers may write it later.
        """
        is_verified = verify or self._check is None or self._check.known(expert) is None
        in_memory = self._reader.is_in_memory(source)
        copied = self._reader.fetch(expert, source) if in_memory else None

        def work() -> tuple[np.ndarray, bool]:
            weights = self._reader.fetch(expert, source) if copied is None else copied
            if is_verified:
                self.verify(expert, weights, source)
            return weights, is_verified

        return Fetch(key_of(source), work)

    def _write(self, move: Move, weights: np.ndarray, is_verified: bool) -> None:
        self._bank.write(move.slot, move.expert, weights)
        if is_verified:
            self._learn(move)
        elif failure := self._check.mismatch(move.expert, *self._check.of([move.slot])):
            self._bank.clear(move.slot)
            raise RelocationFailed(failure)

    def _streams(self, source: Source) -> bool:
        """Whether it is read block by block, straight into the slot."""
        job_of, target = self._store.expert_job, self._bank.target(0)
        return source.kind is SourceKind.CHECKPOINT and job_of(0, target, False) is not None

    def _stream(self, moves: list[Move]) -> Iterator[Filled]:
        """Loads slots from the store with several threads. A slot that failed holds nothing."""
        if not moves:
            return
        jobs, started = {}, time.monotonic()
        for move in moves:
            self._bank.begin(move.slot)
            # A read in place may still write after it was given up and the next source was used.
            in_place = len(move.sources) == 1
            job = self._store.expert_job(move.expert, self._bank.target(move.slot), in_place)
            jobs[job] = move
        for job in self._loader.load(list(jobs)):
            if job.error is None:
                self._bank.holds(jobs[job].slot, jobs[job].expert)
                self._learn(jobs[job])
            self._beat()
        share_s = (time.monotonic() - started) / len(moves)
        for job, move in jobs.items():
            yield move, share_s, None if job.error is None else str(job.error)

    def _settle(self, filled: Iterable[Filled]) -> dict[int, str]:
        """Counts what was filled. Returns {slot: reason} of failures."""
        failures = {}
        for move, seconds, failure in filled:
            if failure is None:
                self._note(move, seconds)
            else:
                failures[move.slot] = failure
        return failures

    def _learn(self, move: Move) -> None:
        if self._check is not None:
            self._check.learn(move.expert, move.slot)

    def _note(self, move: Move, seconds: float) -> None:
        """Counts an expert from its first source, and the seconds to fetch, check and write it."""
        source = move.sources[0]
        itemsize = (self._bank.dtype if source.kind in _IN_HEAP else self._stored_dtype).itemsize
        kind, nbytes = source.kind.value, math.prod(self._bank.layout.expert_shape) * itemsize
        self.rates.note(source.kind, nbytes, seconds)
        self.moved[kind] = self.moved.get(kind, 0) + 1
        self.bytes_moved[kind] = self.bytes_moved.get(kind, 0) + nbytes
        into = f"expert {move.expert} into slot {move.slot} from {describe(source)}"
        _log.info("%s in %.1f ms", into, seconds * 1e3)


def _failure(move: Move, reason: object) -> str:
    """Logs and returns why the first source failed."""
    source = describe(move.sources[0])
    _log.warning("expert %d from %s failed: %s", move.expert, source, reason)
    return f"{source}: {reason}"
