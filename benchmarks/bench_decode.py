"""Decode steps of a model of real size with random weights, whole on one GPU.

    python -m benchmarks.bench_decode --out=benchmarks/results/decode.jsonl

The step is the one that serving compiles. Before it is timed, the same step with CHECKED_LAYERS
layers is compared with plain experts. The bound is the time to read, once, what a step must read:
the experts that some token chose, the dense weights, and keys and values.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

from benchmarks import bench_step, command
from benchmarks.bench_step import STEPS, Live
from benchmarks.gpu_rates import add_rate, read_rate
from benchmarks.gpu_timing import (
    Chained,
    Timing,
    add_times,
    compile_all,
    measure_one,
    open_gpu,
)
from benchmarks.gpu_trace import longest, run_kernels, shares
from benchmarks.harness import Sheet, Unfit
from benchmarks.world import World, bytes_of, shape_of, touched_slots, with_layers

CONFIG = "qwen3_30b_a3b_h100x1"
BATCHES, FEW = (1, 16, 64, 256), (4,)
CACHED_TOKENS = 65536  # of all sequences together, at most
CONTEXT_TOKENS = 1024  # room of a sequence, at most; half of it is used
CHECKED_LAYERS = 2
AIM, AIM_BATCH = 0.7, 64  # of the bound
MEMORY_FRACTION = "0.96"  # of the GPU, for JAX: no other process uses it


def world_of(layers: int, batch: int) -> World:
    """The configuration with one rank that holds all experts, and sequences that fit beside it."""
    config = command.config(CONFIG)
    config, experts = with_layers(config, layers), config.model.experts
    cluster = dataclasses.replace(config.cluster, ranks=1, slots_per_rank=experts, redundancy=1)
    engine = dataclasses.replace(
        config.engine,
        batch_rows=batch,
        prefill_tokens=batch,
        step_rows=(),
        kv_pages=0,
        row_tile=batch,
        context_tokens=min(CONTEXT_TOKENS, CACHED_TOKENS // batch),
    )
    return World(dataclasses.replace(config, cluster=cluster, engine=engine))


def check(batches, executables, abort) -> None:
    """Raises Unfit where a short stack of layers disagrees with plain experts."""
    short = world_of(CHECKED_LAYERS, 1)
    weights = short.dense(), short.bank(), abort
    for batch in batches:
        world = world_of(CHECKED_LAYERS, batch)
        live = bench_step.live_of(world, executables[f"short {batch}"], *weights)
        bench_step.check(live, executables[f"plain {batch}"], world.batch())


@dataclasses.dataclass(frozen=True)
class Line:
    """The result of one batch size."""

    world: World
    timing: Timing
    bound_us: float
    kernels: list[tuple[str, float]]  # of STEPS steps

    @property
    def shares(self) -> dict[str, float]:
        return shares(self.kernels)

    @property
    def tokens(self) -> int:
        return self.world.config.engine.batch_rows

    @property
    def reached(self) -> float:
        return self.bound_us / self.timing.p50_us

    def add_to(self, sheet: Sheet) -> None:
        of = sheet.of(**shape_of(self.world), model=self.world.config.model.name)
        add_times(of, self.timing, bound=self.bound_us)
        per_s = lambda time_us: self.tokens / time_us * 1e6
        more = {"samples": len(self.timing.samples_us)}
        rate, bound = per_s(self.timing.p50_us), per_s(self.bound_us)
        of.add("tokens_per_s", rate, "tokens/s", bound=bound, **more)
        for part, share in self.shares.items():
            of.add(f"share_{part}", share, **more)

    def __str__(self) -> str:
        parts = "  ".join(f"{part} {share:.0%}" for part, share in self.shares.items())
        busy_us, verdict = sum(time for _, time in self.kernels) / STEPS, ""
        if self.tokens == AIM_BATCH:
            verdict = f", at least {AIM}: {command.verdict(self.reached >= AIM)}"
        return (
            f"decode B={self.tokens:<4} context {self.world.context_tokens:<5} "
            f"{self.timing.p50_us:9.1f} us p50 {self.timing.p99_us:9.1f} p99   "
            f"bound {self.bound_us:9.1f} us   {self.tokens / self.timing.p50_us * 1e6:9,.0f} "
            f"tokens/s   {self.reached:.2f} of the bound{verdict}\n"
            f"         {busy_us:.1f} us in {len(self.kernels) // STEPS} kernels: {parts}"
        )


def measure_batch(live: Live, rate: float, samples: int) -> Line:
    world, batch = live.world, live.world.batch()
    run = Chained(bench_step.live_steps(live, batch), bench_step.start_of(world, batch, 8), STEPS)
    timing = measure_one(run, samples)
    if np.asarray(run.carry[3]).any():
        raise Unfit("a rank that is alone suspects someone")
    tables = world.alone(0)
    result = live.run(run.carry[0], tables, batch, world.call(tables, live.abort_address))
    size = bytes_of(world, touched_slots(tables, result.chosen), world.context_tokens)
    state = [bench_step.start_of(world, batch, 8)]
    del run, result

    def again():
        state[0] = bench_step.live_steps(live, batch)(state[0])
        return state[0]

    jax.block_until_ready(again())
    return Line(world, timing, size.total / rate * 1e6, run_kernels(again))


def main() -> int:
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", MEMORY_FRACTION)
    device, quick = open_gpu(), absl_flags.FLAGS.quick
    samples, layers = (5 if quick else 15), absl_flags.FLAGS.layers
    batches = command.numbers("shapes", FEW if quick else BATCHES)
    abort = jax.block_until_ready(jnp.zeros(8, jnp.uint32))
    rate = read_rate(samples)
    print(f"{device}: reads {rate / 1e12:.2f} TB/s", flush=True)
    programs = {}
    for batch in batches:
        short, whole = world_of(CHECKED_LAYERS, batch), world_of(layers, batch)
        arguments = short.arguments(short.alone(0))
        programs[f"short {batch}"] = short.live(arguments)
        programs[f"plain {batch}"] = short.reference(arguments)
        programs[f"whole {batch}"] = whole.counting(whole.arguments(whole.alone(0)))
    executables = compile_all(programs, threads=16)
    sheet = Sheet("decode", device, 1, {})
    add_rate(sheet, "read_rate", rate, samples)
    command.keep(sheet.records)
    check(batches, executables, abort)
    whole = world_of(layers, 1)
    weights = whole.dense(), whole.bank(), abort
    for batch in batches:
        executable = executables[f"whole {batch}"]
        live = bench_step.live_of(world_of(layers, batch), executable, *weights)
        line = measure_batch(live, rate, samples)
        print(line, flush=True)
        if absl_flags.FLAGS.kernels:
            print(longest(line.kernels, absl_flags.FLAGS.kernels), flush=True)
        # Each batch is kept at once: a run takes long.
        sheet.records.clear()
        line.add_to(sheet)
        command.keep(sheet.records)
        del live
    return 0


if __name__ == "__main__":
    command.define_gpu()
    absl_flags.DEFINE_integer("layers", 1 << 30, "Layers of the model at most.", 1)
    absl_flags.DEFINE_integer("kernels", 0, "Kernels to list that took longest in a batch.", 0)
    command.run(main)
