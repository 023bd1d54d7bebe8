"""Experts out of the bank of a rank on another GPU, in turn with a plain copy of the same memory.

    python -m benchmarks.bench_wide_sources --config=small_moe_h100x1 --out=...       # two GPUs
    python -m benchmarks.bench_wide_sources --platform=cpu --config=tiny_cpu

Rank 0 brings as many experts as one death orphans: `moved` copies them, `checked` does what a
repair does, fingerprints and all. They are first compared, bit by bit, with the weights as drawn.
The other sources (backups in host memory, storage) do not depend on how many GPUs there are:
`bench_sources` times them.
"""

from absl import flags as absl_flags

from benchmarks import command, sources
from benchmarks.harness import Record, Sheet
from benchmarks.processes import machine_of, run_directory, run_workers
from benchmarks.wide.exchange_report import read_found
from launch import flags
from launch.console import say
from launch.errors import UsageError

AIM = 0.8  # of the plain copy


def define() -> None:
    command.define_machine()
    absl_flags.DEFINE_integer("samples", 9, "How often each is timed; the median counts.", 1)
    absl_flags.DEFINE_float("deadline_s", 180.0, "For all of it.")


def main() -> list[Record]:
    values = absl_flags.FLAGS
    # Two ranks are enough: the others would only wait.
    machine, config = machine_of(values.platform, 2), flags.run_config()
    if config.platform != values.platform:
        raise UsageError(
            f"--config={config.name} is for {config.platform}, --platform={values.platform}"
        )
    job = {"flags": flags.forwarded(), "samples": values.samples}
    sheet = Sheet("wide_sources", machine.device, 2, machine.facts | {"samples": values.samples})
    where = {"deadline_s": values.deadline_s, "fraction": 0.3}
    with run_directory() as directory:
        say(f"{machine.device}: logs: {directory.path}")
        run_workers("benchmarks.wide.sources_rank", machine, job, directory.path, **where)
        found = read_found(directory.path, 2)
    for _, line in found.of("source"):
        r = sources.add_rate(sheet, line["name"], line["rates"], **line["shape"])
        aim = f", at least {AIM:.0%}" if r.metric == "peer moved" else ""
        say(f"{r.metric}: {r.value:.1f} GB/s, plain copy {r.baseline:.1f} GB/s, {r.ratio:.0%}{aim}")
    return sheet.records


if __name__ == "__main__":
    define()
    command.run(main)
