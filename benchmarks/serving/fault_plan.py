"""Plans of failures: the ranks of each phase of a run, such as [[0,1,2,3],[0,1,-2,3],[0,1,3]].

Each phase lists its ranks. `-2` is rank 2, killed in this phase; a rank that is not listed is away;
one that is back in a list is brought back. Rank 0 is killed by `-0` (or "-0"), which is valid JSON.
"""

import dataclasses
import json
import re

EXAMPLE = "[[0,1,2,3],[0,1,-2,3],[0,1,3],[0,1,2,3]]"


@dataclasses.dataclass(frozen=True)
class Phase:
    """Changes of a phase: `back` at its beginning, `killed` in its midst."""

    present: tuple[int, ...]  # in the beginning, those that come back included
    killed: tuple[int, ...] = ()
    back: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """`0,1,-2,3`, as it is written."""
        return ",".join(f"-{r}" if r in self.killed else str(r) for r in self.present)


def parse_plan(text: str, ranks: int) -> tuple[Phase, ...]:
    """The phases of a plan for a cluster of so many ranks.

    >>> [p.killed for p in parse_plan("[[0,1],[-0,1],[1],[0,1]]", 2)]
    [(), (0,), (), ()]

    Raises ValueError naming the phase that is wrong, and what to write instead.
    """
    try:
        # Python reads -0 as 0, so integers stay words until their sign was seen.
        plan = json.loads(text, parse_int=str)
    except ValueError as error:
        raise ValueError(f"{text!r} is not JSON ({error}); write it as {EXAMPLE}") from None
    if not isinstance(plan, list) or not plan:
        raise ValueError(f"{text!r} must be a list of phases, such as {EXAMPLE}")
    entries = [_entries(number, phase, ranks) for number, phase in enumerate(plan)]
    return tuple(_phases(entries, ranks))


def _entries(number: int, phase: object, ranks: int) -> dict[int, bool]:
    """rank -> whether it is killed."""
    if not isinstance(phase, list) or not phase:
        raise ValueError(f"phase {number} is {phase!r}; list the ranks in it, such as [0,1,-2,3]")
    found: dict[int, bool] = {}
    for word in phase:
        if not isinstance(word, str) or not re.fullmatch(r"-?[0-9]{1,6}", word):
            raise ValueError(f"phase {number}: {word!r} is not a rank; write 2, or -2 to kill it")
        rank = int(word.removeprefix("-"))
        if rank >= ranks:
            raise ValueError(f"phase {number}: there is no rank {rank}, only 0..{ranks - 1}")
        if rank in found:
            raise ValueError(f"phase {number}: rank {rank} is listed twice; list it once")
        found[rank] = word.startswith("-")
    if all(found.values()):
        raise ValueError(f"phase {number} kills every rank in it; leave one alive")
    return found


def _phases(entries: list[dict[int, bool]], ranks: int):
    alive = set(range(ranks))
    for number, phase in enumerate(entries):
        if number == 0 and (missing := sorted(alive - phase.keys())):
            raise ValueError(
                f"phase 0 leaves out ranks {missing}, but a run begins with all of them; "
                f"begin with {json.dumps(sorted(alive))}"
            )
        if gone := sorted(alive - phase.keys()):
            raise ValueError(
                f"phase {number} leaves out ranks {gone}, which are alive; "
                f"kill them in phase {number - 1} first: write -{gone[0]} there"
            )
        back = tuple(sorted(phase.keys() - alive))
        killed = tuple(rank for rank, dies in phase.items() if dies)
        if both := sorted(set(back) & set(killed)):
            raise ValueError(
                f"phase {number} brings back and kills rank {both[0]} at once; "
                "use one phase for its return and the next one for its death"
            )
        yield Phase(tuple(sorted(phase)), killed, back)
        alive = set(phase) - set(killed)
