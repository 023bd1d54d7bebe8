"""Experts out of the bank of a rank on another GPU, in turn with a plain copy of the same memory.

    python -m benchmarks.bench_wide_sources --config=small_moe_h100x1 --out=...       # two GPUs
    python -m benchmarks.bench_wide_sources --platform=cpu --config=tiny_cpu

Rank 0 brings as many experts as one death orphans: `moved` copies them, `checked` does what a
repair does, fingerprints and all. They are first compared, bit by bit, with the weights as drawn.
The other sources (backups in host memory, storage) do not depend on how many GPUs there are:
`bench_sources` times them.
"""

import pathlib
import shutil
import sys

from absl import app
from absl import flags as absl_flags

from benchmarks.harness import Record, append, commit, compared, now, percentile
from benchmarks.wide.exchange_report import read_found
from benchmarks.wide.workers import WorkersFailed, fresh_directory, machine_of, run_workers
from launch import flags
from launch.console import say
from launch.environments.local import parse_gpus
from launch.errors import UsageError

AIM = 0.8  # of the plain copy


def define() -> None:
    """Of the process that is started, not of one that imports this."""
    f = absl_flags
    f.DEFINE_enum("platform", "gpu", ["gpu", "cpu"], "What ranks compute on.")
    f.DEFINE_integer("ranks", None, "How many ranks; else one for each GPU, two on CPU.", 2)
    f.DEFINE_integer("samples", 9, "How often each is timed; the median counts.", 1)
    f.DEFINE_float("deadline_s", 180.0, "For all of it.")
    f.DEFINE_string("out", None, "File of records to append to; none: only the table.")


def main() -> int:
    values = absl_flags.FLAGS
    gpus = None if flags.GPUS.value is None else parse_gpus(flags.GPUS.value)
    # Two ranks are enough: the others would only wait.
    machine = machine_of(values.platform, 2, gpus)
    config = flags.override(flags.load_config(flags.CONFIG.value), *flags.OVERRIDE.value)
    if config.platform != values.platform:
        raise UsageError(
            f"--config={config.name} is for {config.platform}, --platform={values.platform}"
        )
    job = {
        "config": config.name,
        "overrides": list(flags.OVERRIDE.value),
        "samples": values.samples,
    }
    directory = fresh_directory(None)
    before = {"commit": commit(), "time": now()}
    try:
        run_workers(
            "benchmarks.wide.sources_rank",
            machine,
            job,
            directory,
            deadline_s=values.deadline_s,
            fraction=0.3,
        )
    except WorkersFailed as error:
        say(f"no result: {error}; logs: {directory}", "bold red")
        return 1
    records = []
    for _, line in read_found(directory, 2).of("source"):
        own, plain = (percentile(line[name], 50) / 1e9 for name in ("own", "plain"))
        shape = {"config": config.name, **line["shape"], **machine.facts}
        records.append(
            Record(
                bench="wide_sources",
                metric=line["name"],
                value=own,
                unit="GB/s",
                device=machine.device,
                ranks=2,
                shape=shape | {"samples": values.samples},
                **compared(plain, own),
                **before,
            )
        )
        aim = f", at least {AIM:.0%}" if line["name"] == "peer moved" else ""
        say(f"{line['name']}: {own:.1f} GB/s, plain copy {plain:.1f} GB/s, {own / plain:.0%}{aim}")
    shutil.rmtree(directory, ignore_errors=True)
    if values.out:
        append(pathlib.Path(values.out), records)
        say(f"appended {len(records)} records to {values.out}")
    return 0


if __name__ == "__main__":
    define()
    sys.exit(app.run(flags.main_with_usage(main)))
