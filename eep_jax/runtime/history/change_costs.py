"""Costs of each change of members: its reason, the experts moved, and its seconds by phase.

detect      from the dead rank's last sign of life to the verdict; 0 without a death
agree       from the verdict to Prepare, and the agreement's time beyond the work of its ranks
detach      mapping and unmapping of peers, on the rank with the most work
fetch       bringing experts, on that rank
commit      swapping the tables
first_step  from there to the first committed step; unknown if no rank had work
load        of a joining rank, before the change; the others serve meanwhile

`starts` has, for each new process by rank, the seconds of its start by phase and the origin of its
executables (`rank.start_timer`).
"""

import collections
import dataclasses

from eep_jax.runtime.control.messages import ChangeTimes

REPORT_MS = 3_000  # after the commit, for the ranks' reports
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
    settled: set[int] = dataclasses.field(
        default_factory=set
    )  # ranks from which no further report is due

    @property
    def is_complete(self) -> bool:
        return self.settled >= self.members


class ChangeCosts:
    """Collects the reports of pending changes. Times are of the supervisor's clock, in ms."""

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

    def add_times(self, rank: int, times: ChangeTimes) -> None:
        for pending in self._pending:
            if pending.epoch == times.epoch and rank in pending.members:
                pending.times[rank] = times
                if times.first_step_s is not None:
                    pending.settled.add(rank)
            elif pending.epoch < times.epoch:  # ranks report their changes in order
                pending.settled.add(rank)

    def take(self, now_ms: int) -> list[dict]:
        """The records that are due, by epoch: all members reported, or REPORT_MS passed."""
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
