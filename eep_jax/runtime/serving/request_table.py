"""Table of all requests: which wait, which rank has which, and the tokens produced so far.

Pure: no clock, no sockets. Tokens are a function of the request alone, so a request that moves
from a dead rank to another, or runs twice, still has one result.
"""

import collections
import dataclasses
from collections.abc import Iterable

from eep_jax.engine.request import NOT_FINITE, Progress, Request
from eep_jax.errors import ProtocolError, QueueFull


@dataclasses.dataclass
class Entry:
    """One request's life. `request` is as accepted: nothing was produced before."""

    request: Request
    key: str | None = None  # the client's Idempotency-Key
    body: str = ""  # the client's request, compared when its key is repeated
    created: float = 0.0
    produced: list[int] = dataclasses.field(default_factory=list)  # all tokens so far
    rank: int | None = None
    finish: str = ""
    degraded: set[int] = dataclasses.field(default_factory=set)

    def continuation(self) -> Request:
        """The request for the next rank: it goes on behind the tokens produced so far."""
        return dataclasses.replace(self.request, produced=tuple(self.produced))


class RequestTable:
    """At most `queue_max` unfinished requests, and the last `finished_max` finished ones."""

    def __init__(self, queue_max: int, finished_max: int, per_rank_max: int):
        self._queue_max, self._finished_max = queue_max, finished_max
        self._per_rank_max = per_rank_max
        self.entries: dict[str, Entry] = {}
        self._by_key: dict[str, str] = {}
        self._queue: collections.deque[str] = collections.deque()
        self._finished: collections.deque[str] = collections.deque()
        self.counts = collections.Counter()

    def submit(self, entry: Entry) -> Entry:
        """Adds a new request. Raises QueueFull, and then the table is unchanged."""
        self.check_room(1)
        self.entries[entry.request.id] = entry
        if entry.key is not None:
            self._by_key[entry.key] = entry.request.id
        self._queue.append(entry.request.id)
        self.counts["accepted"] += 1
        return entry

    def check_room(self, count: int) -> None:
        """Raises QueueFull where so many more requests would exceed the maximum."""
        unfinished = len(self.entries) - len(self._finished)
        if unfinished + count > self._queue_max:
            raise QueueFull(
                f"{unfinished} requests are being served, the maximum is {self._queue_max}, and "
                f"{count} more would exceed it; try again later"
            )

    def by_key(self, key: str) -> Entry | None:
        return self.entries.get(self._by_key.get(key, ""))

    def assign(self, ranks) -> list[tuple[int, Request]]:
        """Assigns waiting requests to the least loaded of `ranks`, the lowest on a tie."""
        given = []
        if not self._queue:  # the usual case, after every event
            return given
        taken = collections.Counter(e.rank for e in self.entries.values() if not e.finish)
        load = {rank: taken[rank] for rank in ranks}
        while self._queue and load:
            rank = min(load, key=lambda r: (load[r], r))
            if load[rank] >= self._per_rank_max:
                break
            entry = self.entries[self._queue.popleft()]
            entry.rank = rank
            load[rank] += 1
            given.append((rank, entry.continuation()))
        return given

    def of_rank(self, rank: int) -> list[Entry]:
        return [e for e in self.entries.values() if e.rank == rank and not e.finish]

    def produced(self, rank: int, progress: Progress) -> Entry | None:
        """Appends a rank's tokens; returns the entry if it changed.

        Tokens of a request that was taken from this rank are ignored. Raises ProtocolError if the
        tokens leave a gap, or differ from those already produced.
        """
        entry = self.entries.get(progress.id)
        if entry is None or entry.rank != rank or entry.finish:
            return None  # finished, or taken from this rank
        have = len(entry.produced)
        if progress.start < 0 or progress.start > have:
            raise ProtocolError(
                f"rank {rank} sends tokens of {progress.id} from {progress.start}, "
                f"but only {have} are known"
            )
        known = entry.produced[progress.start :]
        again = list(progress.tokens[: len(known)])
        if again != known[: len(again)]:
            raise ProtocolError(
                f"rank {rank} produced other tokens for {progress.id} from {progress.start}: "
                f"{again[:8]}, known are {known[:8]}"
            )
        new = list(progress.tokens[len(known) :])
        room = entry.request.max_tokens - have
        if len(new) > room:
            raise ProtocolError(
                f"rank {rank} produced {len(new)} tokens for {progress.id}, room for {room}"
            )
        entry.produced.extend(new)
        self.counts["tokens"] += len(new)
        if progress.finish:
            self._end(entry, progress.finish)
        return entry if new or progress.finish else None

    def release(self, rank: int) -> list[Entry]:
        """Takes all requests from a rank; they wait again, ahead of all others."""
        lost = self.of_rank(rank)
        for entry in reversed(lost):
            entry.rank = None
            self._queue.appendleft(entry.request.id)
        self.counts["requeued"] += len(lost)
        return lost

    def reconcile(self, rank: int, held: set[str]) -> tuple[list[str], list[Request]]:
        """After a reconnect: (ids that the rank should drop, requests that it lacks)."""
        mine = {e.request.id: e for e in self.of_rank(rank)}
        forget = sorted(held - set(mine))
        return forget, [e.continuation() for i, e in mine.items() if i not in held]

    def adopt(self, rank: int, request_id: str) -> None:
        """Records, after a restart, that `rank` has this request."""
        entry = self.entries.get(request_id)
        if entry is not None and entry.rank is None and not entry.finish:
            entry.rank = rank
            self._queue.remove(request_id)

    def cancel(self, request_id: str) -> Entry | None:
        """Ends a request; returns its entry if it was unfinished."""
        entry = self.entries.get(request_id)
        if entry is None or entry.finish:
            return None
        if entry.rank is None:
            self._queue.remove(request_id)
        self._end(entry, "cancelled")
        return entry

    def restore(self, entries: Iterable[Entry]) -> None:
        """Adds the requests from before a restart, oldest first; unfinished ones wait again."""
        for entry in entries:
            self.entries[entry.request.id] = entry
            if entry.key is not None:
                self._by_key[entry.key] = entry.request.id
        for entry in list(self.entries.values()):
            if entry.finish:
                self._keep_finished(entry)
            else:
                self._queue.append(entry.request.id)

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def running(self) -> int:
        return len(self.entries) - len(self._finished) - len(self._queue)

    def _end(self, entry: Entry, finish: str) -> None:
        entry.finish = finish
        self.counts[finish if finish in ("cancelled", NOT_FINITE) else "finished"] += 1
        self._keep_finished(entry)

    def _keep_finished(self, entry: Entry) -> None:
        self._finished.append(entry.request.id)
        while len(self._finished) > self._finished_max:
            old = self.entries.pop(self._finished.popleft())
            if old.key is not None and self._by_key.get(old.key) == old.request.id:
                del self._by_key[old.key]
