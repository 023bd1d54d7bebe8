"""Problems that keep a cluster from being whole, as sentences for its operator. Pure."""

from eep_jax.coordination.protocol import Mode
from eep_jax.coordination.shortages import explain
from eep_jax.coordination.state import CoordinatorState

SHOWN_MAX = 8  # ranks that are listed one by one
TOLD_AT_ONCE = (" failed: ", "the journal is older than")  # of the reason of a single death


def problems(state: CoordinatorState, events) -> list[str]:
    """Ranks that are out and why, experts that no source supplies, and missing backups.

    `events` are those of the status, oldest first. Empty if the cluster is whole.
    """
    found = [f"no expert coverage: {state.blocked}"] if state.blocked else []
    if not state.blocked and (why := explain(state)):
        lacking = sorted(set(state.dropped) & {e for _, e in state.shortages.reasons})
        found.append(f"{why} (served without experts {lacking})" if lacking else why)
    troubles = [trouble for rank in _awaited(state) if (trouble := _trouble(state, rank, events))]
    found += troubles[:SHOWN_MAX]
    if len(troubles) > SHOWN_MAX:
        found.append(f"and {len(troubles) - SHOWN_MAX} ranks more are not in")
    without: dict[str, list[int]] = {}
    for rank, record in enumerate(state.records):
        if record.is_current and record.status is not None and record.status.backup.problem:
            without.setdefault(record.status.backup.problem, []).append(rank)
    return found + [f"backups are missing on ranks {r}: {why}" for why, r in without.items()]


def waiting_for(state: CoordinatorState) -> str:
    """What a cluster before its first epoch waits for."""
    inside = [r for r in _awaited(state) if state.records[r].is_current]
    absent = [r for r in _awaited(state) if r not in inside]
    alone = [r for r in inside if _mode(state, r) in (None, Mode.ALONE)]
    parts = []
    if absent:
        parts.append(f"no process of ranks {absent} has come")
    if alone:
        parts.append(f"ranks {alone} load and compile")
    loading = [r for r in inside if r not in alone]
    if loading and not parts:
        parts.append(f"ranks {loading} load their experts")
    return "; ".join(parts)


def all_silent(state: CoordinatorState, now_ms: int) -> str:
    """Why nothing is computed although there are members: none shows life; '' if one does.

    Half a lease of silence is enough: single ranks may be that late, all of them are not.
    """
    members = state.view.in_epoch
    if not members:
        return ""
    silent_ms = now_ms - max(state.records[rank].heard_ms for rank in members)
    if silent_ms <= state.config.lease_ms / 2:
        return ""
    return f"no rank has shown life for {silent_ms} ms"


def _awaited(state: CoordinatorState) -> list[int]:
    """Ranks that are out, except those that the operator took out."""
    inside = state.view.in_epoch
    return [rank for rank in state.view.ranks if rank not in inside and rank not in state.out]


def _mode(state: CoordinatorState, rank: int) -> Mode | None:
    status = state.records[rank].status
    return None if status is None else status.mode


def _trouble(state: CoordinatorState, rank: int, events) -> str:
    """Why a rank is out: the last death of its processes since it was a member; '' if unknown.

    A single death is reported only if it is one of TOLD_AT_ONCE: a killed process usually returns.
    """
    deaths: list[str] = []
    for event in events:
        if event["kind"] == "commit" and rank in _members(event):
            deaths.clear()
        elif event["kind"] == "dead" and event["rank"] == rank:
            deaths.append(event["reason"])
    if not deaths or (len(deaths) == 1 and not any(words in deaths[0] for words in TOLD_AT_ONCE)):
        return ""
    times = f", {len(deaths)} times by now" if len(deaths) > 1 else ""
    return f"{deaths[-1]}{times}"


def _members(commit: dict) -> set[int]:
    return {int(rank) for rank in commit["members"]}
