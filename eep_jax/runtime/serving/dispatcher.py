"""Requests go out to ranks, tokens come back; the journal has the begin and the end of each."""

import dataclasses
import logging
from collections.abc import Callable, Iterable

from eep_jax.engine.request import Progress
from eep_jax.runtime.control.channels import Channels
from eep_jax.runtime.control.messages import Forget, Generate
from eep_jax.runtime.serving.request_table import Entry, RequestTable

_log = logging.getLogger(__name__)


class RequestDispatcher:
    """The ranks' side of the request book; `CompletionFrontend` is that of the clients.

    `record` writes a line of the journal, `changed` wakes who reads a request. `awaited` are the
    members of before a restart: most requests are on one of them already, so none is given out
    while one of them may still say so.
    """

    def __init__(
        self,
        table: RequestTable,
        channels: Channels,
        record: Callable[[str, dict], object],
        changed: Callable[[str], None],
        awaited: Iterable[int] = (),
    ):
        self._table, self._channels = table, channels
        self._record, self._changed = record, changed
        self._awaited = set(awaited)

    def accepted(self, entry: Entry) -> None:
        """A client's request is in the book; the next `assign` gives it to a rank."""
        self._record("accepted", accepted_facts(entry))

    def cancelled(self, entry: Entry) -> None:
        """Its client is gone, so its rank need not go on."""
        self._record("finished", finished_facts(entry))
        if entry.rank is not None:
            self._channels.send(entry.rank, Forget(id=entry.request.id))

    def assign(self, ranks: list[int]) -> None:
        """Gives waiting requests to those of `ranks` that said which they have.

        `ranks` are the members that take requests.
        """
        if self._awaited.intersection(ranks):
            return
        for rank, request in self._table.assign(self._channels.settled(ranks)):
            self._channels.send(rank, Generate(request=request))

    def produced(self, rank: int, progress: Progress, dropped: Iterable[int] = ()) -> None:
        """A rank's tokens. `dropped` are experts without a replica, which they may be without.

        Raises ProtocolError for tokens that do not go on where the known ones end.
        """
        entry = self._table.produced(rank, progress)
        if entry is None:
            return
        if progress.dropped:
            entry.degraded.update(dropped)
            self._table.counts["dropped_choices"] += progress.dropped
        if entry.finish:
            self._record("finished", finished_facts(entry))
            self._channels.send(rank, Forget(id=entry.request.id))
        self._changed(entry.request.id)

    def held(
        self, rank: int, held: tuple[Progress, ...], is_member: bool, dropped: Iterable[int] = ()
    ) -> None:
        """A rank is back: both learn what the other has. It may know more than the journal."""
        for progress in held:
            self._table.adopt(rank, progress.id)
            self.produced(rank, progress, dropped)
        if not is_member:
            self._table.release(rank)  # it was drained before it, or this supervisor, heard so
        forget, resend = self._table.reconcile(rank, {progress.id for progress in held})
        for request_id in forget:
            self._channels.send(rank, Forget(id=request_id))
        for request in resend:
            self._channels.send(rank, Generate(request=request))
        self._awaited.discard(rank)

    def release(self, rank: int) -> None:
        """Requests of a rank that is out go to others, with the tokens it said before."""
        for entry in self._table.release(rank):
            self._channels.send(rank, Forget(id=entry.request.id))
            _log.info("request %s waits for another rank", entry.request.id)


def accepted_facts(entry: Entry) -> dict:
    """What the journal keeps of a request, to go on with it after a restart."""
    facts = {"key": entry.key, "body": entry.body, "created": entry.created}
    return facts | {"request": dataclasses.asdict(entry.request)}


def finished_facts(entry: Entry) -> dict:
    """What the journal keeps of a request that is over, for a client that asks again."""
    return {"id": entry.request.id, "finish": entry.finish, "tokens": entry.produced}
