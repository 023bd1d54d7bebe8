"""Dispatch of requests to ranks and of their tokens back, with begin and end in the journal."""

import dataclasses
import logging
from collections.abc import Callable, Iterable

from eep_jax.engine.request import Progress
from eep_jax.runtime.control.channels import Channels
from eep_jax.runtime.control.messages import Forget, Generate
from eep_jax.runtime.serving.request_table import Entry, RequestTable

_log = logging.getLogger(__name__)


class RequestDispatcher:
    """The ranks' side of the request table; `CompletionFrontend` is the clients' side.

    `record` appends to the journal, `changed` wakes the readers of a request. `awaited` are the
    members from before a restart: most requests are on one of them already, so none is assigned
    until each has reported its requests or left.
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
        """Journals a client's request that was added to the table; `assign` gives it to a rank."""
        self._record("accepted", accepted_facts(entry))

    def cancelled(self, entry: Entry) -> None:
        """Journals the end of a cancelled request, and has its rank drop it."""
        self._record("finished", finished_facts(entry))
        if entry.rank is not None:
            self._channels.send(entry.rank, Forget(id=entry.request.id))

    def assign(self, ranks: list[int]) -> None:
        """Gives waiting requests to the settled ones of `ranks`, the members that take requests."""
        if self._awaited.intersection(ranks):
            return
        for rank, request in self._table.assign(self._channels.settled(ranks)):
            self._channels.send(rank, Generate(request=request))

    def produced(self, rank: int, progress: Progress, dropped: Iterable[int] = ()) -> None:
        """Adds a rank's tokens to the table. `dropped` are the experts without a replica.

        Raises ProtocolError if the tokens leave a gap or contradict the known ones.
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
        """Reconciles a reconnected rank with the table; it may have more tokens."""
        for progress in held:
            self._table.adopt(rank, progress.id)
            self.produced(rank, progress, dropped)
        if not is_member:
            self._table.release(rank)  # drained before the rank or this supervisor knew
        forget, resend = self._table.reconcile(rank, {progress.id for progress in held})
        for request_id in forget:
            self._channels.send(rank, Forget(id=request_id))
        for request in resend:
            self._channels.send(rank, Generate(request=request))
        self._awaited.discard(rank)

    def release(self, rank: int) -> None:
        """Queues the requests of a rank that left, to continue elsewhere behind its tokens."""
        for entry in self._table.release(rank):
            self._channels.send(rank, Forget(id=entry.request.id))
            _log.info("request %s waits for another rank", entry.request.id)


def accepted_facts(entry: Entry) -> dict:
    """Journal record of a request, enough to continue it after a restart."""
    facts = {"key": entry.key, "body": entry.body, "created": entry.created}
    return facts | {"request": dataclasses.asdict(entry.request)}


def finished_facts(entry: Entry) -> dict:
    """Journal record of a request's end, for a client that repeats its key."""
    return {"id": entry.request.id, "finish": entry.finish, "tokens": entry.produced}


def ids_only(kind: str, facts: dict) -> dict:
    """The facts of a record without what a client sent or received; see serve.journal_texts.

    Example:
        >>> ids_only("finished", {"id": "cmpl-1", "finish": "stop", "tokens": [7, 9]})
        {'id': 'cmpl-1', 'finish': 'stop'}
    """
    match kind:
        case "accepted":
            return {"id": facts["request"]["id"], "created": facts["created"]}
        case "finished":
            return {"id": facts["id"], "finish": facts["finish"]}
    return facts
