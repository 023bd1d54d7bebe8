"""Dispatch and combine between processes that have a GPU each, beside the link and NCCL.

    python -m benchmarks.bench_wide --out=benchmarks/results/wide.jsonl     # all GPUs there are
    python -m benchmarks.bench_wide --ranks=2 --gpus=0 --tokens=16,128      # two share one GPU
    python -m benchmarks.bench_wide --platform=cpu --ranks=2                # the protocol, no rate

1. Each rank opens its heap, maps its peers', and copies their memory: the link's rate.
2. Every size is checked first, uniform and skewed routings, in windows that were full of NaN. What
   is wrong at one rank is timed at none.
3. Chains of exchanges, all ranks in lockstep, read on the GPU's clock.
4. With a GPU for each rank, XLA's collectives (NCCL) move the same bytes in a process of their own.

With fewer GPUs than ranks some share one and take turns of milliseconds: that shows that all is
right, and its times are of the turns. Such records say `link: shared_gpu`.
"""

import dataclasses
import pathlib
import time

from absl import flags as absl_flags

from benchmarks import command
from benchmarks.harness import Record, Sheet
from benchmarks.processes import (
    Machine,
    WorkersFailed,
    machine_of,
    run_directory,
    run_workers,
)
from benchmarks.wide.exchange import FP8, Family
from benchmarks.wide.exchange_report import Found, add_records, finish, published, read_found
from launch.console import say
from launch.errors import UsageError

TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096)
LINK_BYTES = {"gpu": 256 << 20, "cpu": 1 << 20}
MEMORY_FRACTION = 0.55  # of a GPU, for JAX; windows of 4096 tokens take of the rest


def define() -> None:
    command.define_machine()
    f = absl_flags
    f.DEFINE_list("tokens", None, f"Tokens of each rank. Default: {','.join(map(str, TOKENS))}.")
    f.DEFINE_integer("hidden", 7168, "Channels of a row.", 64)
    f.DEFINE_integer("experts", 256, "Experts of all ranks together.", 1)
    f.DEFINE_integer("top_k", 8, "Choices of a token.", 1)
    f.DEFINE_integer("samples", 30, "Runs that are timed, of each size.", 1)
    f.DEFINE_float("deadline_s", 420.0, "For all of it.")
    f.DEFINE_bool("collectives", True, "Also time XLA's collectives.")
    f.DEFINE_string("directory", None, "For logs and reports of ranks; else a temporary one.")


def main() -> int:
    values = absl_flags.FLAGS
    machine = machine_of(values.platform, values.ranks)
    every = TOKENS if values.platform == "gpu" else (4, 16)
    tokens = tuple(sorted(set(command.numbers("tokens", every))))
    families = families_of(machine, tokens, values.hidden, values.experts, values.top_k)
    sheet = Sheet("wide", machine.device, machine.ranks, machine.facts)
    with run_directory(values.directory) as directory:
        logs = directory.path
        say(f"{machine.device}: {machine.ranks} ranks, link {machine.link}; logs: {logs}")
        problems = _run(machine, families, logs)
        found = read_found(logs, machine.ranks)
        add_records(sheet, found, families)
        if sheet.records:
            show(found, sheet.records)
        return finish(sheet.records, problems + found.failures, directory)


def families_of(
    machine: Machine, tokens: tuple[int, ...], hidden: int, experts: int, choices: int
) -> tuple[Family, ...]:
    """bfloat16 rows with a result per choice, and fp8 rows with a sum per rank; float32 on CPU.

    Raises UsageError for sizes that kernels or routings do not take.
    """
    if choices > experts:
        raise UsageError(f"--top_k={choices} of --experts={experts}: there are not so many")
    gpu = machine.platform == "gpu"
    if gpu and (hidden % 128 or (choices % 4 and any(t * choices % 4 for t in tokens))):
        raise UsageError(
            f"--hidden={hidden} must be a multiple of 128, and --tokens x --top_k of 4, on a GPU"
        )
    sizes = {"ranks": machine.ranks, "tokens": tokens, "choices": choices, "hidden": hidden}
    sizes |= {"experts": experts, "row_dtype": "bfloat16" if gpu else "float32"}
    return (
        Family(**sizes, combine="per_choice"),
        Family(**sizes, combine="per_rank", dispatch_dtype=FP8 if gpu else ""),
    )


def _run(machine: Machine, families: tuple[Family, ...], directory: pathlib.Path) -> list[str]:
    """Runs ranks, then collectives; returns what went wrong, in words."""
    values, problems = absl_flags.FLAGS, []
    ends_s = time.monotonic() + values.deadline_s
    left = lambda: max(1.0, ends_s - time.monotonic())
    job = {
        "families": [dataclasses.asdict(family) for family in families],
        "samples": values.samples,
        "link": machine.link,
        "link_bytes": LINK_BYTES[machine.platform],
        "threads": 8 if machine.platform == "gpu" else 1,
    }
    try:
        where = {"deadline_s": left(), "fraction": MEMORY_FRACTION}
        run_workers("benchmarks.wide.exchange_rank", machine, job, directory, **where)
    except WorkersFailed as error:
        problems.append(str(error))
    if not values.collectives:
        return problems
    if machine.link == "shared_gpu" or machine.ranks == 1:
        say("collectives: left out, NCCL needs a GPU for each of at least two ranks")
        return problems
    # One process that sees every GPU.
    alone = Machine(machine.platform, 1, (",".join(machine.gpus),) if machine.gpus else ())
    devices = f"--xla_force_host_platform_device_count={machine.ranks}"
    variables = {"XLA_FLAGS": devices} if machine.platform == "cpu" else {}
    try:
        run_workers(
            "benchmarks.wide.collectives",
            alone,
            job,
            directory,
            deadline_s=left(),
            fraction=MEMORY_FRACTION,
            variables=variables,
        )
    except WorkersFailed as error:
        problems.append(f"collectives: {error}")
    return problems


def show(found: Found, records: list[Record]) -> None:
    """The curve over tokens, with the bound, NCCL, and what others published."""
    rates = ", ".join(f"{way} {r / 1e9:.0f} GB/s" for way, r in found.link_bytes_per_s.items())
    say(f"copy of a peer's memory: {rates or 'no peer'}")
    dense = {
        (r.shape["collective"], r.shape["tokens"]): r.value
        for r in records
        if r.bench == "wide_collective" and r.metric.endswith("p50")
    }
    rows = []
    times = [r for r in records if r.metric.startswith("time") and r.bench != "wide_collective"]
    for p50, p99 in zip(times[::2], times[1::2], strict=True):
        name, tokens = p50.bench.removeprefix("wide_"), p50.shape["tokens"]
        number = lambda value: command.number(value, ".1f")
        kind = " ".join(filter(None, (p50.shape["dtype"], p50.shape.get("combine"))))
        cells = [name, kind, str(tokens), number(p50.value), number(p99.value), number(p50.bound)]
        cells += [number(dense.get((c, tokens))) for c in ("all_to_all", "ragged_all_to_all")]
        rows.append([*cells, published(name, tokens)])
    columns = "exchange|kind|>T|>p50|>p99|>bound|>a2a|>ragged|>published"
    command.show(f"{records[0].device}; us", columns, rows, width=170)


if __name__ == "__main__":
    define()
    command.run(main)
