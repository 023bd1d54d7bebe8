"""Event log: journal, status, metrics and log from one call.

Each change of members also leaves a `repair` record of its costs; see `change_costs`.
"""

import collections
import logging
from collections.abc import Callable, Iterable

from eep_jax.runtime.control.messages import ChangeTimes
from eep_jax.runtime.history.change_costs import ChangeCosts, ChangeTotals
from eep_jax.runtime.history.journal import Journal

_log = logging.getLogger(__name__)

EVENTS_MAX = 500
UNLOGGED = ("slots", "moves")  # long, and in the journal


class EventLog:
    """The last `EVENTS_MAX` events, the last commit, and counts since this supervisor started.

    `before` are the events from before a restart, `members` the ranks of the restored epoch.
    """

    def __init__(
        self,
        journal: Journal,
        now_ms: Callable[[], int],
        before: Iterable[dict] = (),
        members: Iterable[int] = (),
    ):
        self._journal, self._now_ms = journal, now_ms
        self._costs = ChangeCosts(members)
        before = list(before)
        self.commit = next((e for e in reversed(before) if e["kind"] == "commit"), None)
        self.events: collections.deque[dict] = collections.deque(before, maxlen=EVENTS_MAX)
        self.counts, self.totals = collections.Counter(), ChangeTotals()

    def note(self, kind: str, facts: dict, silent_ms: int = 0) -> None:
        """Records an event. `silent_ms`: of `dead`, the time since the rank's last sign of life."""
        # First, so that no consequence of the event precedes it on disk.
        record = self._journal.append(kind, facts)
        self.events.append(record)
        self.counts[kind] += 1
        _log.info("%s %s", kind, {k: v for k, v in facts.items() if k not in UNLOGGED})
        now_ms = self._now_ms()
        match kind:
            case "prepare":
                self._costs.prepared(facts["epoch"], now_ms)
            case "dead":
                self._costs.dead(facts["rank"], facts["reason"], silent_ms, now_ms)
            case "commit":
                self.commit = record
                self._costs.committed(facts, now_ms)

    def add_times(self, rank: int, times: ChangeTimes) -> None:
        """Adds a rank's report on its last change."""
        self._costs.add_times(rank, times)
        self.note_costs()

    def note_costs(self) -> None:
        """Records the costs of each change whose reports are complete or overdue."""
        for facts in self._costs.take(self._now_ms()):
            self.totals.add(facts)
            self.note("repair", facts)
