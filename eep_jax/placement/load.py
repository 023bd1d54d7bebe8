"""Load of each expert: counts of how often it is chosen, decaying with time."""

import dataclasses

HALF_LIFE_MS = 60_000
CHOICES_MIN = 64.0  # per expert on average, before decisions use them


@dataclasses.dataclass(frozen=True)
class LoadEstimate:
    """Choices of each expert as of `at_ms`; counts of one half-life earlier have half weight."""

    choices: tuple[float, ...] = ()
    at_ms: int = 0


def observe(estimate: LoadEstimate, choices, now_ms: int) -> LoadEstimate:
    """Adds new choices by expert.

    >>> observe(LoadEstimate((8.0, 2.0), 0), (1, 1), HALF_LIFE_MS).choices
    (5.0, 2.0)
    """
    before = estimate.choices or (0.0,) * len(choices)
    if len(before) != len(choices):
        raise ValueError(f"choices of {len(choices)} experts, expected {len(before)}")
    faded = 0.5 ** (max(0, now_ms - estimate.at_ms) / HALF_LIFE_MS)
    added = tuple(old * faded + new for old, new in zip(before, choices, strict=True))
    return LoadEstimate(added, max(now_ms, estimate.at_ms))


def settled(estimate: LoadEstimate) -> tuple[float, ...]:
    """Loads to decide by; empty while there are too few choices."""
    enough = CHOICES_MIN * len(estimate.choices)
    return estimate.choices if estimate.choices and sum(estimate.choices) >= enough else ()
