"""Everything that only several GPUs can show, in one command: first what is right, then how fast.

    python -m benchmarks.multi_gpu --out=DIR                            # all GPUs, all parts
    python -m benchmarks.multi_gpu --out=DIR --parts=correct,exchange,decode   # in two calls
    python -m benchmarks.multi_gpu --out=DIR --parts=recovery,scaling,whole
    python -m benchmarks.multi_gpu --out=DIR --parts=chained            # with 4 or 8 GPUs
    python -m benchmarks.multi_gpu --out=DIR --gpus=0 --ranks=2         # two share one GPU
    python -m benchmarks.multi_gpu --out=DIR --platform=cpu             # tiny, on CPU ranks

Each part is a process with a deadline and a log of its own in DIR; one that fails is told, and the
next one runs. No call takes longer than --budget_s. Records go to DIR/*.jsonl; what is there from
an earlier call counts in the summary, whose lines say what was reached.
"""

import pathlib
import signal

from absl import flags as absl_flags
from rich.console import Console
from rich.table import Table

from benchmarks.harness import read
from benchmarks.processes import machine_of
from benchmarks.wide.parts import parts_of
from benchmarks.wide.running import Done, chosen, run_parts
from benchmarks.wide.targets import Target, summary
from launch import flags, program
from launch.console import say
from launch.environments.local import parse_gpus
from launch.errors import UsageError


def define() -> None:
    """Of the process that is started, not of one that imports this."""
    f = absl_flags
    f.DEFINE_string("out", None, "Directory of logs and records; may hold those of earlier calls.")
    f.DEFINE_list("parts", None, "Groups of parts, in their order; else all of them.")
    f.DEFINE_enum("platform", "gpu", ["gpu", "cpu"], "What ranks compute on.")
    f.DEFINE_integer("ranks", None, "How many ranks; else one for each GPU, two on CPU.", 1)
    f.DEFINE_float("budget_s", 540.0, "For all parts of this call.")
    f.DEFINE_bool("small", None, "Small sizes, to see that all runs; else where no GPU is alone.")
    f.DEFINE_bool("list", False, "Only says which parts there are.")


def main() -> int:
    values = absl_flags.FLAGS
    if not values.out:
        raise UsageError("--out=DIR must name a directory for logs and records")
    gpus = None if flags.GPUS.value is None else parse_gpus(flags.GPUS.value)
    machine = machine_of(values.platform, values.ranks, gpus)
    small = machine.link != "peer" if values.small is None else values.small
    directory = pathlib.Path(values.out).absolute()
    try:
        parts = chosen(parts_of(machine, directory, small), values.parts)
    except ValueError as error:
        raise UsageError(f"--parts: {error}") from error
    # A shell's background job ignores it, and so would the parts that are to end in order.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    say(f"{machine.device}: {machine.ranks} ranks, link {machine.link}; {directory}")
    if values.list:
        for part in parts:
            say(f"{part.group:10} {part.name:16} at most {part.deadline_s:.0f} s")
        return 0
    directory.mkdir(parents=True, exist_ok=True)
    done = run_parts(parts, directory, values.budget_s, say=lambda text: print(text, flush=True))
    records = read(sorted(directory.glob("*.jsonl")))
    show(done, summary(records, machine.ranks))
    return 0 if all(d.ok for d in done) else 1


def show(done: list[Done], lines: list[Target]) -> None:
    parts = Table(title="parts", title_justify="left")
    for name in ("part", "seconds", "status"):
        parts.add_column(name, justify="right" if name == "seconds" else "left")
    for d in done:
        parts.add_row(d.part.name, f"{d.seconds:.0f}", d.status)
    table = Table(title="aims", title_justify="left")
    for name in ("what", "measured", "aim", "verdict"):
        table.add_column(name, justify="right" if name in ("measured", "aim") else "left")
    for line in lines:
        table.add_row(line.what, line.value, line.aim, line.verdict)
    console = Console(highlight=False, width=130)
    console.print(parts, markup=False)
    console.print(table, markup=False)


if __name__ == "__main__":
    define()
    program.run(main)
