"""Cost of the return of a rank for the others, and the time that the new process takes to start.

    python -m benchmarks.bench_rejoin --cycles=8 --out=benchmarks/results/rejoin.jsonl

The same cycles as `bench_recovery`, looked at from the other side; beside it, a full restart of the
same cluster.
"""

from benchmarks import command, rank_cycles
from benchmarks.harness import Record
from benchmarks.rank_cycles import Measured, Rows


def main() -> list[Record]:
    return rank_cycles.run(rows)


def rows(measured: Measured) -> Rows:
    found, of, cycles = measured.rows(), measured.of, measured.cycles
    found.add("rejoin", "pause_s", of("return_pause"), "s", baseline=measured.restart)
    found.add("rejoin", "unharmed_gap_s", of("steady_gap"), "s")
    reduced = rank_cycles.percentile(of("rate_reduced"), 50)
    found.add(
        "rejoin", "preparing_tokens_per_s", of("rate_preparing"), "tokens/s", baseline=reduced
    )
    shares = [cycle.rate_preparing / cycle.rate_reduced for cycle in cycles]
    found.add("rejoin", "survivors_share", shares, "", bound=1.0)
    for phase in cycles[0].phases:
        values = [cycle.phases[phase] for cycle in cycles]
        baseline = measured.restart if phase == "total_s" else None
        found.add("rejoin", phase, values, "s", baseline=baseline)
    for phase in rank_cycles.PAUSES:
        seconds = [cycle.admission["seconds"].get(phase) or 0.0 for cycle in cycles]
        found.add("rejoin", f"phase_{phase}_s", seconds, "s")
    bank = [float(sum(cycle.admission["bytes"].values())) for cycle in cycles]
    found.add("rejoin", "bytes_brought", bank, "bytes")
    compiled = [float(compilations(cycle.admission)) for cycle in cycles]
    found.add("rejoin", "compilations", compiled, "", bound=0.0)
    return found


def compilations(admission: dict) -> int:
    """Compilations of all processes that joined with this change."""
    return sum(start["compilations"] for start in admission["starts"].values())


if __name__ == "__main__":
    rank_cycles.define()
    command.run(main)
