"""All measurements of several GPUs in one command: first correctness, then speed.

    python -m benchmarks.multi_gpu --out=DIR                            # all GPUs, all parts
    python -m benchmarks.multi_gpu --out=DIR --parts=correct,exchange,decode   # in two calls
    python -m benchmarks.multi_gpu --out=DIR --parts=recovery,scaling,whole
    python -m benchmarks.multi_gpu --out=DIR --parts=chained            # with 4 or 8 GPUs
    python -m benchmarks.multi_gpu --out=DIR --gpus=0 --ranks=2         # two share one GPU
    python -m benchmarks.multi_gpu --out=DIR --platform=cpu             # tiny, on CPU ranks

Each part is a process with a deadline and a log of its own in DIR; a failure is reported, and the
next part runs. No call takes longer than --budget_s. Records go to DIR/*.jsonl; those of earlier
calls count in the summary, whose lines say which aims were reached.
"""

import pathlib
import signal

from absl import flags as absl_flags

from benchmarks import command
from benchmarks.harness import read
from benchmarks.processes import machine_of
from benchmarks.wide.parts import parts_of
from benchmarks.wide.running import Done, chosen, run_parts
from benchmarks.wide.targets import Target, summary
from launch.console import say
from launch.errors import UsageError


def define() -> None:
    command.define_machine()
    f = absl_flags
    f.DEFINE_list("parts", None, "Groups of parts, in their order; without it all of them.")
    f.DEFINE_float("budget_s", 540.0, "For all parts of this call.")
    f.DEFINE_bool("small", None, "Small sizes, the default where ranks share a GPU or run on CPU.")
    f.DEFINE_bool("list", False, "Only lists the parts.")


def main() -> int:
    values = absl_flags.FLAGS
    if not values.out:
        raise UsageError("--out=DIR must name a directory for logs and records")
    machine = machine_of(values.platform, values.ranks)
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
    parts = [[d.part.name, f"{d.seconds:.0f}", d.status] for d in done]
    command.show("parts", "part|>seconds|status", parts)
    aims = [[line.what, line.value, line.aim, line.verdict] for line in lines]
    command.show("aims", "what|>measured|>aim|verdict", aims)


if __name__ == "__main__":
    define()
    command.run(main)
