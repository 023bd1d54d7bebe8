"""Rates at which each source brings experts into slots, beside a plain copy of the same bytes.

    python -m benchmarks.bench_sources --config=tiny_cpu      # or a configuration of platform gpu

Two ranks in one process, on one device. Each source brings as many experts as one rank's death
orphans; in turn with it the same bytes are copied plainly:

    peer         a copy within the own slab; on a GPU by its copy engine
    backup       own host memory: a copy between two arrays; on a GPU, from pinned memory
    p2p          another rank's backup over Orbax: the same bytes over a socket
    checkpoint   Orbax on storage: reading a plain file of the same bytes

`moved` leaves out the check of a slot's contents, `checked` has it. Moved experts are compared with
the checkpoint, bit by bit, before anything is timed.
"""

import os
import pathlib
import shutil
import tempfile

from absl import flags as absl_flags
from absl import logging as absl_logging

from benchmarks import command
from benchmarks.harness import Record, Sheet, cpu_device, gpu_device
from benchmarks.processes import environment_of, machine_of
from eep_jax.config import RunConfig
from eep_jax.runtime.rank.scratch_dir import scratch
from launch import flags

COPIES = 5  # of the experts on disk: two backups, a checkpoint, plain files, and one in writing
SOURCES = ("peer", "backup", "p2p", "checkpoint")
TOKEN = "a token of the benchmark alone"


def define() -> None:
    command.define()
    absl_flags.DEFINE_list("only", None, "These sources, as peer,backup; without it all.")
    absl_flags.DEFINE_integer("samples", 9, "How often each is timed; the median counts.", 1)


def main() -> list[Record]:
    only = command.among("only", SOURCES)
    config = flags.run_config()
    gpus = flags.gpus() if config.platform == "gpu" else ()
    with scratch(_roomy(config), "bench") as directory:
        one = machine_of(config.platform, 1, gpus)
        os.environ.update(environment_of(one, 0, directory / "cache", 0.1))
        absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax logs every step of every read
        device = gpu_device(gpus[0]) if gpus else cpu_device()
        records = measure(config, device, directory, only)
    title = f"{device}; {dict(records[0].shape)}"
    rows = [[r.metric, f"{r.value:.2f}", f"{r.baseline:.2f}", f"{r.ratio:.0%}"] for r in records]
    command.show(title, "source|>GB/s|>plain copy GB/s|>share", rows)
    return records


def measure(config: RunConfig, device: str, scratch: pathlib.Path, only: list[str]) -> list[Record]:
    from benchmarks import sources  # loads JAX, under the variables set before

    samples, config = absl_flags.FLAGS.samples, sources.sized(config)
    sheet = Sheet("sources", device, 2, sources.shape_of(config) | {"samples": samples})
    bench = sources.TwoRanks(config, scratch, TOKEN)
    try:
        for name, own, plain in bench.comparisons(only):
            rates = sources.time_both(own, plain, bench.bringing.bytes, samples)
            sources.add_rate(sheet, name, rates)
    finally:
        bench.close()
    return sheet.records


def _roomy(config: RunConfig) -> str:
    """The directory of backups if it has room for all copies, else that of temporary files."""
    model, directory = config.model, config.cluster.backup_dir
    needed = COPIES * (model.experts * model.expert_elements + model.parameters) * 2
    if shutil.disk_usage(directory).free > needed:
        return directory
    print(f"{directory} has no room for {needed} bytes; {tempfile.gettempdir()} is used instead")
    return tempfile.gettempdir()


if __name__ == "__main__":
    define()
    command.run(main)
