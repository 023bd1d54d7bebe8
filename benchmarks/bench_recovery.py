"""Cost of the death of a rank, over many cycles on one cluster under load, and what is moved.

    python -m benchmarks.bench_recovery --cycles=20 --out=benchmarks/results/recovery.jsonl

Beside it, a full restart of the same cluster; what the planner would move in a cluster of another
size; and how fast each source brings experts, in a process of its own (`bench_sources`).
"""

import subprocess
import sys

from absl import flags as absl_flags

from benchmarks import command, rank_cycles
from benchmarks.rank_cycles import Measured, Rows
from eep_jax.placement.placement import EMPTY
from eep_jax.placement.planner import initial_placement, plan_repair
from launch import flags

# On paper: 256 experts and as many spare slots on 32 ranks, of which one dies.
PAPER_EXPERTS, PAPER_RANKS, PAPER_REDUNDANCY = 256, 32, 2
PAPER_SHARE = 0.02  # of all slots that may move before resuming; EEP's own: 0.9
SOURCES_S = 540.0


def main() -> int:
    command.keep(rank_cycles.run(rows))
    return _sources() if absl_flags.FLAGS.sources else 0


def rows(measured: Measured) -> Rows:
    found, of = measured.rows(), measured.of
    whole = rank_cycles.percentile(of("rate_whole"), 50)
    found.add("recovery", "detection_s", of("detection"), "s")
    found.add("recovery", "pause_s", of("pause"), "s", baseline=measured.restart)
    found.add("recovery", "unharmed_gap_s", of("steady_gap"), "s")
    found.add("recovery", "whole_tokens_per_s", of("rate_whole"), "tokens/s")
    found.add("recovery", "reduced_tokens_per_s", of("rate_reduced"), "tokens/s", baseline=whole)
    moved = [float(sum(repair["bytes"].values())) for repair in of("repair")]
    found.add("recovery", "bytes_before_resuming", moved, "bytes", bound=0.0)
    for phase in measured.cycles[0].repair["seconds"]:
        if phase != "load":  # of a rank that comes in
            seconds = [repair["seconds"][phase] or 0.0 for repair in of("repair")]
            found.add("recovery", f"phase_{phase}_s", seconds, "s")
    found.add("recovery", "paper_slots_moved_share", paper_shares(), "", bound=PAPER_SHARE)
    return found


def paper_shares() -> list[float]:
    """The share of all slots that moves before resuming, for the death of each rank in turn."""
    slots = PAPER_EXPERTS * PAPER_REDUNDANCY // PAPER_RANKS
    whole = initial_placement(PAPER_EXPERTS, PAPER_RANKS, slots, PAPER_REDUNDANCY)
    used = sum(expert != EMPTY for row in whole.slots for expert in row)
    survivors = lambda dead: [rank for rank in range(PAPER_RANKS) if rank != dead]
    plans = [plan_repair(whole, survivors(dead)) for dead in range(PAPER_RANKS)]
    return [len(plan.moves) / used for plan in plans]


def _sources() -> int:
    """After the ranks have ended, so that the device is free for it."""
    command = [sys.executable, "-m", "benchmarks.bench_sources", *flags.forwarded()]
    out = [f"--out={absl_flags.FLAGS.out}"] if absl_flags.FLAGS.out else []
    return subprocess.run([*command, *out], timeout=SOURCES_S, check=False).returncode


if __name__ == "__main__":
    rank_cycles.define()
    absl_flags.DEFINE_bool("sources", True, "Also time each source of experts.")
    command.run(main)
