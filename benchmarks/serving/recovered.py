"""When throughput is back after a kill, from the times of tokens."""

from collections.abc import Sequence

SHARE, WINDOW_S = 0.95, 1.0


def recovered_after(
    times: Sequence[tuple[float, int]],
    kill_s: float,
    *,
    share: float = SHARE,
    window_s: float = WINDOW_S,
) -> float | None:
    """Seconds from the kill until `share` of the rate before it is reached, None if it never is.

    `times` are (seconds, tokens). The rate is that of a window which begins after the kill; its
    beginning counts. Tokens come in bursts of a step, so a window holds many. With 100 tokens/s
    before, none for 0.5 s, and 96 tokens/s from then on, it is 0.5 s.

    Raises ValueError where no token came before the kill.
    """
    ordered = sorted(times)
    before = [(at_s, count) for at_s, count in ordered if at_s < kill_s]
    if not before or before[0][0] >= kill_s:
        raise ValueError(f"no token came before the kill at {kill_s} s")
    rate = sum(count for _, count in before) / (kill_s - before[0][0])
    after = [(at_s, count) for at_s, count in ordered if at_s >= kill_s]
    last_s = after[-1][0] if after else kill_s
    for at_s, _ in after:
        if at_s + window_s > last_s:
            return None
        inside = sum(count for t, count in after if at_s <= t < at_s + window_s)
        if inside >= share * rate * window_s:
            return at_s - kill_s
    return None
