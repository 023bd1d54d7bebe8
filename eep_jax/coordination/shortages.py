"""Shortages: experts that no source supplied to a rank, and when they are tried again. Pure.

1. A rank fetches what it can, stays alive, and lists the other experts in its Status as `lost`.
2. Such an expert goes to another rank: the cause may be the first one's network or disk.
3. Once RANKS_TRIED ranks could not get it, plans leave it out. Without a replica of it the cluster
   is blocked, or continues without it (`degrade`); other moves go on.
4. After a pause, twice as long each time, all shortages are forgotten and tried again: once the
   file is repaired or the host is back, no operator has to act.
"""

import dataclasses

from eep_jax.coordination.protocol import OUTSIDE, Mode, Status
from eep_jax.coordination.records import want_resync, with_record
from eep_jax.coordination.state import CoordinatorState, Shortages
from eep_jax.placement.placement import EMPTY

RANKS_TRIED = 2
RETRY_MS, RETRY_MAX_MS = 2_000, 32_000
NAMED_MAX = 3  # experts whose reasons `explain` gives


def note_lost(state: CoordinatorState, status: Status, now_ms: int) -> CoordinatorState:
    """Records the experts that a reporting rank could not get for its last message.

    A joining rank is not sent for them again: it is admitted without them.
    """
    if not status.lost:
        return state
    rank, record = status.rank, state.records[status.rank]
    wanted = _wanted(state, status)
    slots = [s for s, e in enumerate(wanted) if status.contents[s] != e and e in status.lost]
    if not slots:
        return state
    known = state.shortages
    reasons = {(rank, wanted[slot]): status.lost[wanted[slot]] for slot in slots}
    if not reasons.keys() <= known.reasons.keys():
        if not known.reasons:  # the first of this try; later ones do not delay the next try
            wait_ms = min(RETRY_MS << known.tries, RETRY_MAX_MS)
            known = Shortages(until_ms=now_ms + wait_ms, tries=min(known.tries + 1, 8))
        found = dataclasses.replace(known, reasons=known.reasons | reasons)
        state = dataclasses.replace(state, shortages=found)
    if record.load is not None and wanted is record.load.slots:
        kept = tuple(EMPTY if slot in slots else e for slot, e in enumerate(wanted))
        moves = tuple(move for move in record.load.moves if move.slot not in slots)
        load = dataclasses.replace(record.load, slots=kept, moves=moves)
        state = with_record(state, rank, load=load)
    return state


def _wanted(state: CoordinatorState, status: Status) -> tuple[int, ...]:
    """The slots that a rank was sent to fill; () if its `lost` belongs to an older message."""
    change, task = state.change, state.background.task
    load = state.records[status.rank].load
    if len(status.contents) != state.config.slots_per_rank:
        return ()
    if change is not None and change.includes(status.rank):
        is_of_change = status.mode is Mode.READY and status.prepared == change.view.epoch
        return change.plan.placement.slots[status.rank] if is_of_change else ()
    if task is not None and status.fetched == task.number:
        return task.plan.placement.slots[status.rank]
    if load is not None and status.mode in OUTSIDE and status.epoch == 0:
        return load.slots
    return ()


def forget_old(state: CoordinatorState, now_ms: int) -> CoordinatorState:
    """Forgets all shortages once their pause is over, so that they are tried again."""
    known = state.shortages
    if not known.reasons or now_ms < known.until_ms:
        return state
    short = sorted({expert for _, expert in known.reasons} & set(state.dropped))
    state = dataclasses.replace(state, shortages=dataclasses.replace(known, reasons={}))
    if short and state.config.background_experts == 0:  # otherwise background work does it
        return want_resync(state, f"experts {short} are tried again")
    return state


def after_success(known: Shortages) -> Shortages:
    """The shortages after a commit: if none is left, the next pause is a short one again."""
    return known if known.reasons else Shortages()


def avoided(state: CoordinatorState) -> frozenset[tuple[int, int]]:
    """(rank, expert) that no plan may bring together now."""
    by_expert: dict[int, set[int]] = {}
    for rank, expert in state.shortages.reasons:
        by_expert.setdefault(expert, set()).add(rank)
    ranks = set(state.view.ranks)
    tried = lambda found: ranks if len(found) >= min(RANKS_TRIED, len(ranks)) else found
    return frozenset((rank, e) for e, found in by_expert.items() for rank in tried(found))


def explain(state: CoordinatorState) -> str:
    """One reason for each missing expert; '' if none is missing."""
    reasons = {expert: why for (_, expert), why in sorted(state.shortages.reasons.items())}
    shown = [why for _, why in sorted(reasons.items())[:NAMED_MAX]]
    more = len(reasons) - len(shown)
    return "; ".join(shown) + (f"; and {more} experts more" if more > 0 else "")
