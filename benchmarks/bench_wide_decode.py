"""Whole decode steps of models of real size with random weights, a rank per GPU, by batch.

    python -m benchmarks.bench_wide_decode --config=qwen3_30b_a3b_h200x2 --out=...    # all GPUs
    python -m benchmarks.bench_wide_decode --config=deepseek_v3_h200x32 --ranks=8 --layers=16
    python -m benchmarks.bench_wide_decode --platform=cpu --config=tiny_cpu --ranks=2 --batches=4

Every rank is one process that holds all systems: `live`, the step of serving; `fixed`, the same
with its members compiled in; and static sharding by psum, all_to_all, ring and ragged_all_to_all
(jax.distributed, NCCL). They share one bank, one cache and one set of dense weights, so the same
experts are on the same ranks, each once. Steps are the compiled ones, without scheduler and HTTP.

1. A stack with two expert layers: all systems against plain experts.
2. Each batch: as many layers as asked for, or as fit; blocks of steps of all systems alternate.
"""

import pathlib

from absl import flags as absl_flags

from benchmarks import command
from benchmarks.harness import Record, Sheet, nvidia_smi
from benchmarks.processes import (
    Machine,
    WorkersFailed,
    free_port,
    machine_of,
    run_directory,
    run_workers,
)
from benchmarks.wide.decode_report import add_records
from benchmarks.wide.decode_sizes import layers_that_fit, share_of, systems_of, with_sizes
from benchmarks.wide.exchange_report import finish, read_found
from eep_jax.config import RunConfig
from launch.console import say
from launch.errors import UsageError

CONFIG = {"gpu": "qwen3_30b_a3b_h200x2", "cpu": "tiny_cpu"}
BATCHES = {"gpu": (1, 16, 64, 256), "cpu": (4,)}
CACHED_TOKENS = 131_072  # of a rank's sequences together, at most
CONTEXT_TOKENS = {"gpu": 1024, "cpu": 32}  # room of a sequence, at most; half of it is used
STEPS, STEPS_CPU = 10, 3
AIM_MEMBERSHIP = 1.01  # time of live over fixed


def define() -> None:
    command.define_machine()
    f = absl_flags
    f.DEFINE_list("batches", None, "Sequences of each rank. Default on GPUs: 1,16,64,256.")
    f.DEFINE_integer("layers", 0, "Layers of the model at most; 0: as many as fit.", 0)
    f.DEFINE_integer("context_tokens", None, "Room of a sequence, of which half is used.", 2)
    f.DEFINE_list("systems", None, "Only these; without it all of the machine.")
    f.DEFINE_integer("samples", 12, "Blocks of steps that are timed.", 1)
    f.DEFINE_float("deadline_s", 480.0, "For all of it.")
    f.DEFINE_string("directory", None, "For logs and reports of ranks; else a temporary one.")


def main() -> int:
    values = absl_flags.FLAGS
    machine = machine_of(values.platform, values.ranks)
    config = _config()
    systems = command.among("systems", systems_of(machine.platform, machine.link, machine.ranks))
    sizes = _sizes(config, machine)
    configs = [with_sizes(config, ranks=machine.ranks, **size) for size in sizes]
    sheet = Sheet("wide_decode", machine.device, machine.ranks, machine.facts)
    layers = sorted({c.model.layers for c in configs})
    with run_directory(values.directory) as directory:
        logs = directory.path
        say(
            f"{machine.device}: {machine.ranks} ranks of {config.model.name}, {layers} of "
            f"{config.model.layers} layers: {', '.join(systems)}; logs: {logs}"
        )
        problems = _run(machine, config, configs, sizes, systems, logs)
        found = read_found(logs, machine.ranks)
        add_records(sheet, found, configs)
        if sheet.records:
            show(sheet.records)
        return finish(sheet.records, problems + found.failures, directory)


def _config() -> RunConfig:
    platform = absl_flags.FLAGS.platform
    config = command.config(CONFIG[platform])
    if config.platform != platform:
        raise UsageError(f"--config={config.name} is for {config.platform}, --platform={platform}")
    return config


def _sizes(config: RunConfig, machine: Machine) -> list[dict]:
    """Arguments of `with_sizes` for each batch, without ranks. Raises UsageError."""
    values, platform = absl_flags.FLAGS, machine.platform
    batches = command.numbers("batches", BATCHES[platform])
    sizes = []
    for batch in batches:
        context = values.context_tokens or CONTEXT_TOKENS[platform]
        size = {"batch": batch, "context_tokens": max(2, min(context, CACHED_TOKENS // batch))}
        layers = values.layers or config.model.layers
        if platform == "gpu":
            try:
                given = size | {"ranks": machine.ranks}
                most = layers_that_fit(config, gpu_bytes(), _sharing(machine), given)
            except ValueError as error:
                raise UsageError(str(error)) from error
            layers = min(layers, most)
        sizes.append(size | {"layers": layers})
    # The check and the memory of all batches are of the fewest layers that any of them takes.
    fewest = min(size["layers"] for size in sizes)
    return [size | {"layers": fewest} for size in sizes]


def _sharing(machine: Machine) -> int:
    return -(-machine.ranks // max(1, len(machine.gpus)))


def gpu_bytes() -> int:
    """Memory of the first GPU. Raises UsageError where nvidia-smi does not give it."""
    found = nvidia_smi("memory.total")
    if not found.isdecimal():
        raise UsageError(f"nvidia-smi gives {found!r} for memory.total, not the MiB of a GPU")
    return int(found) << 20


def _run(machine, config, configs, sizes, systems, directory: pathlib.Path) -> list[str]:
    """Runs the ranks; returns what went wrong, in words."""
    values = absl_flags.FLAGS
    fraction = 0.5
    if machine.platform == "gpu":
        sharing = _sharing(machine)
        fraction = sharing * min(share_of(c, gpu_bytes(), sharing) for c in configs)
    job = {
        "flags": command.config_flags(CONFIG[machine.platform]),
        "sizes": sizes,
        "systems": systems,
        "samples": values.samples,
        "steps": STEPS if machine.platform == "gpu" else STEPS_CPU,
        "coordinator": f"127.0.0.1:{free_port()}",
    }
    try:
        where = {"deadline_s": values.deadline_s, "fraction": fraction}
        run_workers("benchmarks.wide.decode_rank", machine, job, directory, **where)
    except WorkersFailed as error:
        return [str(error)]
    return []


def show(records: list[Record]) -> None:
    first, number, rows = records[0], command.number, []
    steps = {
        (r.shape["tokens"], r.shape["system"]): r.value for r in records if r.metric == "step p50"
    }
    for r in records:
        if r.metric == "tokens_per_s":
            key = r.shape["tokens"], r.shape["system"]
            share = r.value / r.bound if r.bound else None
            cells = [str(key[0]), key[1], f"{r.value:,.0f}", f"{steps[key]:,.0f}"]
            cells += [number(share, ".2f"), number(r.ratio, ".3f"), r.shape["against"] or ""]
            rows.append(cells)
    command.show(
        f"{first.device}; {first.shape['model']}, {first.shape['layers']} layers",
        ">B|system|>tokens/s|>step us|>of the bound|>/ best static|against",
        rows,
    )
    for batch in dict.fromkeys(r.shape["tokens"] for r in records):
        parts = [r for r in records if r.metric[:6] == "share_" and r.shape["tokens"] == batch]
        if parts:
            parts = ", ".join(f"{r.metric[6:]} {r.value:.0%}" for r in parts)
            say(f"B={batch}: kernels of a step, waiting included: {parts}")
    for r in records:
        if r.metric == "membership p50":
            verdict = command.verdict(r.ratio <= AIM_MEMBERSHIP)
            if r.shape["link"] != "peer":
                verdict = "no verdict, for want of a GPU for each rank"
            say(
                f"B={r.shape['tokens']}: live / compiled-in membership {r.ratio:.4f}, at most "
                f"{AIM_MEMBERSHIP}: {verdict}"
            )


if __name__ == "__main__":
    define()
    command.run(main)
