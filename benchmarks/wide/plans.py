"""Plans of failures for `benchmarks.serve`: several ranks at once, and one after the other."""

import json
import re


def plans_of(ranks: int) -> dict[str, str]:
    """Plans of benchmarks.serve: half of the ranks at once, a quarter, one; and one, one more and
    two more in a chain (8->7->6->4), and all of them back."""
    everyone = list(range(ranks))

    def without(dead) -> list:
        return [rank for rank in everyone if rank not in dead]

    def killing(present, victims) -> list:
        return [rank if rank not in victims else f"-{rank}" for rank in present]

    text = lambda phases: json.dumps(phases, separators=(",", ":")).replace('"', "")
    plans = {}
    for count in sorted({1, ranks // 4, ranks // 2} - {0}):
        dead = everyone[1 : 1 + count]
        phases = [everyone, killing(everyone, dead), without(dead), everyone]
        plans[f"kill_{count}_of_{ranks}"] = text(phases)
    # 8: one, one, two; 4: one, one.
    steps = [[1], [2], [3, 4]] if ranks >= 8 else [[1], [2]]
    phases, gone = [everyone], []
    for victims in steps:
        phases.append(killing(without(gone), victims))
        gone += victims
    phases += [without(gone), everyone]
    plans["chain"] = text(phases)
    return plans


def sizes_of(plan: str) -> str:
    """Ranks that are left after each phase: `[[0,1,2],[0,-1,2],[0,2],[0,1,2]]` is `3->2->3`."""
    sizes: list[int] = []
    for phase in re.findall(r"\[([-0-9,]+)\]", plan):
        alive = sum(not word.startswith("-") for word in phase.split(","))
        if not sizes or alive != sizes[-1]:
            sizes.append(alive)
    return "->".join(map(str, sizes))
