"""Time until throughput is back after a kill, from the times of tokens."""

from collections.abc import Sequence

import numpy as np

SHARE, WINDOW_S = 0.95, 1.0


def recovered_after(
    times: Sequence[tuple[float, int]],
    kill_s: float,
    *,
    resumed_s: float | None = None,
    share: float = SHARE,
    window_s: float = WINDOW_S,
) -> float | None:
    """Seconds from the kill until `share` of the rate before it is reached, None if it never is.

    `times` are (seconds, tokens). The rate is that of a window, whose beginning counts. It begins
    after `resumed_s`, where that is known: tokens of a step that was under way come after the kill,
    and a window that begins with them would hold the stop. Tokens come in bursts of a step, so a
    window holds many. With 100 tokens/s before, none for 0.5 s, and 96 tokens/s from then on, it is
    0.5 s.

    Raises ValueError where no token came before the kill.
    """
    ordered = np.array(sorted(times), np.float64).reshape(-1, 2)
    at_s, total = ordered[:, 0], np.concatenate([[0.0], np.cumsum(ordered[:, 1])])
    first = int(np.searchsorted(at_s, kill_s))
    if not first:
        raise ValueError(f"no token came before the kill at {kill_s} s")
    rate = total[first] / (kill_s - at_s[0])
    begin = max(first, int(np.searchsorted(at_s, kill_s if resumed_s is None else resumed_s)))
    after = at_s[begin:]
    ends = np.searchsorted(at_s, after + window_s)
    inside = total[ends] - total[begin:-1]
    whole = after + window_s <= at_s[-1]
    good = np.flatnonzero(whole & (inside >= share * rate * window_s))
    return float(after[good[0]] - kill_s) if len(good) else None
