"""One record for each change of members: why it was, what moved, and where its seconds went.

detect      from the last sign of life of who died to the verdict; no death, no detection
agree       from the verdict to Prepare, and what the agreement took beyond the work of its ranks
detach      mapping and unmapping of peers, on the rank that was slowest in all
fetch       bringing experts, on that rank
commit      swapping the tables
first_step  from there to the first step that counted; unknown where nobody had work
load        of a rank that came in, before the change; the others served meanwhile

`starts` are those of processes that came in, by rank: their seconds by phase, and where their
executables are from (`start_watch`).
"""

import collections
import dataclasses

from eep_jax.runtime.control.messages import ChangeTimes

REPORT_MS = 3_000  # after the commit, for ranks to say how it went
PAUSE_PHASES = ("detect", "agree", "detach", "fetch", "commit", "first_step")


@dataclasses.dataclass
class _Pending:
    change: str
    epoch: int
    reason: str
    members: frozenset[int]
    detect_s: float
    decide_s: float  # from the verdict to Prepare
    prepare_s: float  # from Prepare until all were ready
    ends_ms: int
    times: dict[int, ChangeTimes] = dataclasses.field(default_factory=dict)
    settled: set[int] = dataclasses.field(default_factory=set)  # ranks that will say no more of it

    @property
    def is_complete(self) -> bool:
        return self.settled >= self.members


class ChangeCosts:
    """Collects what becomes a record. Times are milliseconds of the supervisor's clock."""

    def __init__(self, members=()):
        self._members = frozenset(members)
        self._deaths: list[tuple[int, int, str]] = []  # now_ms, silent_ms, reason
        self._prepared_ms: dict[int, int] = {}
        self._pending: list[_Pending] = []

    def dead(self, rank: int, reason: str, silent_ms: int, now_ms: int) -> None:
        for pending in self._pending:
            pending.settled.add(rank)
        if rank in self._members:
            self._deaths.append((now_ms, silent_ms, reason))

    def prepared(self, epoch: int, now_ms: int) -> None:
        self._prepared_ms = {epoch: now_ms}

    def committed(self, facts: dict, now_ms: int) -> None:
        """`facts` are those of the commit's note."""
        deaths, self._deaths = self._deaths, []
        self._members = frozenset(facts["members"])
        if facts["change"] == "formation":
            return
        prepared_ms = self._prepared_ms.get(facts["epoch"], now_ms)
        self._pending.append(
            _Pending(
                change=facts["change"],
                epoch=facts["epoch"],
                reason="; ".join([reason for _, _, reason in deaths] or [facts["reason"]]),
                members=self._members,
                detect_s=max((silent for _, silent, _ in deaths), default=0) / 1e3,
                decide_s=(prepared_ms - deaths[0][0]) / 1e3 if deaths else 0.0,
                prepare_s=facts["prepare_ms"] / 1e3,
                ends_ms=now_ms + REPORT_MS,
            )
        )

    def told(self, rank: int, times: ChangeTimes) -> None:
        for pending in self._pending:
            if pending.epoch == times.epoch and rank in pending.members:
                pending.times[rank] = times
                if times.first_step_s is not None:
                    pending.settled.add(rank)
            elif pending.epoch < times.epoch:  # a rank tells of its changes one after the other
                pending.settled.add(rank)

    def take(self, now_ms: int) -> list[dict]:
        """The records that are due, by epoch: all members have told, or the time is over."""
        due = []
        while self._pending and (
            self._pending[0].is_complete or now_ms >= self._pending[0].ends_ms
        ):
            due.append(_record(self._pending.pop(0)))
        return due


class ChangeTotals:
    """Sums over all records since this supervisor started, for monitors.

    Keys are (change,), (change, source) and (change, phase).
    """

    def __init__(self):
        self.changes, self.moves = collections.Counter(), collections.Counter()
        self.bytes, self.seconds = collections.Counter(), collections.Counter()

    def add(self, record: dict) -> None:
        change = record["change"]
        self.changes[change,] += 1
        for total, name in ((self.moves, "moves"), (self.bytes, "bytes")):
            total.update({(change, source): n for source, n in record[name].items()})
        # `total` is the sum of the others.
        phases = {p: s for p, s in record["seconds"].items() if p != "total" and s is not None}
        self.seconds.update({(change, phase): s for phase, s in phases.items()})


def _record(pending: _Pending) -> dict:
    times = pending.times
    work_s = {rank: t.detach_s + t.fetch_s for rank, t in times.items()}
    slowest = max(work_s, key=work_s.get, default=None)
    first_steps = [t.first_step_s for t in times.values() if t.first_step_s is not None]
    seconds = {
        "detect": pending.detect_s,
        "agree": pending.decide_s
        + max(0.0, pending.prepare_s - (work_s[slowest] if work_s else 0.0)),
        "detach": times[slowest].detach_s if work_s else None,
        "fetch": times[slowest].fetch_s if work_s else None,
        "commit": max((t.commit_s for t in times.values()), default=None),
        "first_step": max(first_steps, default=None),
    }
    seconds["load"] = max((t.load_s for t in times.values()), default=0.0)
    seconds = {phase: None if s is None else round(s, 6) for phase, s in seconds.items()}
    seconds["total"] = round(sum(seconds[phase] or 0.0 for phase in PAUSE_PHASES), 6)
    return {
        "change": pending.change,
        "epoch": pending.epoch,
        "reason": pending.reason,
        "moves": _sum(t.moved for t in times.values()),
        "bytes": _sum(t.bytes_moved for t in times.values()),
        "seconds": seconds,
        "slowest_rank": slowest,
        "silent_ranks": sorted(pending.members - set(times)),
        "starts": {
            str(r): dataclasses.asdict(t.start) for r, t in sorted(times.items()) if t.start
        },
    }


def _sum(counts) -> dict[str, int]:
    total = collections.Counter()
    for count in counts:
        total.update(count)
    return dict(total)
