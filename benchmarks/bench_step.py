"""A whole decode step of one rank that is alone, against one with its members compiled in.

    python -m benchmarks.bench_step --out=benchmarks/results/step.jsonl

The step is the one that serving compiles (`engine/step.py`). It is called again and again, each
time with what the one before gave back.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

from benchmarks import command
from benchmarks.gpu_rates import add_rate, read_rate
from benchmarks.gpu_timing import (
    Chained,
    Timing,
    add_times,
    compile_all,
    measure,
    open_gpu,
)
from benchmarks.harness import Record, Sheet, Unfit
from benchmarks.world import (
    StepBytes,
    World,
    agreeing,
    bytes_of,
    differences,
    shape_of,
    touched_slots,
    with_layers,
)
from eep_jax.engine.compilations import CompileCounter
from eep_jax.engine.step import Batch
from eep_jax.tables import Tables
from pallas_kernels.exchange.call import Call

CONFIG = "small_moe_h100x1"
LAYERS = 8  # of the model's, without --layers: each has kernels of its own to compile
SILENT = 1  # a rank that is active and takes no part
AIM = 1.01  # live membership over compiled-in
SILENT_DEADLINE_MS = 20
STEPS = 10  # of one run


def world_of(layers: int) -> World:
    """The configuration with so many layers; 0 are all of them."""
    config = command.config(CONFIG)
    return World(with_layers(config, layers))


@dataclasses.dataclass
class Live:
    """A rank's arrays, and the executable of its step."""

    world: World
    executable: object
    dense: list
    bank: jax.Array
    heap: jax.Array
    abort: jax.Array  # its abort word

    @property
    def abort_address(self) -> int:
        return self.abort.unsafe_buffer_pointer()

    def arguments(self, cache, tables: Tables, batch: Batch, call: Call):
        return self.dense, self.bank, cache, self.heap, tables, batch, call

    def run(self, cache, tables: Tables, batch: Batch, call: Call):
        """One step, waited for as `Engine` does."""
        result = self.executable(*self.arguments(cache, tables, batch, call))
        jax.block_until_ready(result.suspicion)
        return result


def live_of(world: World, executable, dense, bank, abort) -> Live:
    window = world.layout.window
    heap = jnp.zeros((window.ranks, window.window_bytes), jnp.uint8)
    return Live(world, executable, dense, bank, heap, abort)


def check(live: Live, reference, batch: Batch) -> list[int]:
    """Compares a step with the reference; returns how many slots each layer touched.

    Raises Unfit.
    """
    world = live.world
    tables = world.alone(0)
    call = world.call(tables, live.abort_address)
    arguments = live.arguments(world.cache(7), tables, batch, call)
    expected = reference(*arguments)
    found = live.run(*arguments[2:3], tables, batch, call)
    if np.asarray(found.suspicion).any():
        raise Unfit(f"a rank that is alone suspects {np.flatnonzero(found.suspicion).tolist()}")
    share = agreeing(expected.tokens, found.tokens)
    print(f"tokens equal to the reference: {share:.0%}", flush=True)
    if wrong := differences(world, expected, found.tokens, found.cache):
        raise Unfit("; ".join(wrong))
    return touched_slots(tables, expected.chosen)


def steps_of(one):
    """STEPS steps of `one(cache, tokens, round, suspicion)`, as a run of such states."""

    def run(state):
        for _ in range(STEPS):
            result = one(*state)
            state = result.cache, result.tokens, result.round, result.suspicion
        return state

    return run


def live_steps(live: Live, batch: Batch):
    tables, world = live.world.alone(0), live.world
    call = jax.device_put(world.call(tables, live.abort_address))
    tables, batch = jax.device_put((tables, batch))

    def one(cache, tokens, round_, suspicion):
        following = dataclasses.replace(batch, tokens=tokens)
        dynamic = dataclasses.replace(call, round=round_, suspicion=suspicion)
        return live.executable(*live.arguments(cache, tables, following, dynamic))

    return steps_of(one)


def fixed_steps(live: Live, executable, batch: Batch):
    batch = jax.device_put(batch)

    def one(cache, tokens, round_, suspicion):
        following = dataclasses.replace(batch, tokens=tokens)
        return executable(live.dense, live.bank, cache, live.heap, following, round_, suspicion)

    return steps_of(one)


def start_of(world: World, batch: Batch, seed: int):
    call = world.call(world.alone(0))
    return (
        world.cache(seed),
        jnp.asarray(batch.tokens),
        jnp.asarray(call.round),
        jnp.asarray(call.suspicion),
    )


def measure_changes(live: Live, batch: Batch, samples: int) -> tuple[dict[str, Timing], int]:
    """Steps under one epoch after the other, by the same executable.

    An epoch with a silent peer, whose step suspects it; the next one without that peer and with
    experts in other slots. Returns times of a `usual` step, of the `failing` one with the silent
    peer, of the `first` one after it, and how many compilations there were. Raises Unfit where a
    rank is suspected that should not be, or the silent one is not.
    """
    world, counter = live.world, CompileCounter()
    cache = world.cache(8)
    before, times = counter.total, {"usual": [], "failing": [], "first": []}
    silent = {"usual": (), "failing": (SILENT,), "first": ()}
    for epoch, name in enumerate(list(times) * samples, 1):
        tables = world.alone(epoch, others=silent[name], shift=epoch)
        deadline_ms = SILENT_DEADLINE_MS if silent[name] else 10_000
        call = world.call(tables, live.abort_address, deadline_ms)
        begin_s = time.perf_counter()
        result = live.run(cache, tables, batch, call)
        times[name].append((time.perf_counter() - begin_s) * 1e6)
        cache = result.cache
        suspected = tuple(np.flatnonzero(np.asarray(result.suspicion)).tolist())
        if suspected != silent[name]:
            raise Unfit(f"epoch {epoch}: suspected {suspected}, silent were {silent[name]}")
    found = counter.total - before
    return {name: Timing(tuple(values)) for name, values in times.items()}, found


def add_records(sheet: Sheet, world: World, timings: dict, bound_us: float, compiled: int) -> None:
    """`timings` by name: live, fixed, usual, failing, first."""
    add_times(sheet, timings["live"], baseline=timings["fixed"], bound=bound_us)
    usual = timings["usual"]
    add_times(sheet, usual, "latency", bound=bound_us)
    first = {"baseline": usual, "bound": bound_us}
    add_times(sheet, timings["first"], "latency_after_failure", **first)
    add_times(sheet, timings["failing"], "latency_silent_peer")
    tokens, samples = world.config.engine.batch_rows, len(timings["live"].samples_us)
    per_s = lambda time_us: tokens / time_us * 1e6
    more = {"bound": per_s(bound_us), "samples": samples}
    sheet.add("tokens_per_s", per_s(timings["live"].p50_us), "tokens/s", **more)
    sheet.add("compilations", compiled, bound=0, samples=samples)


def main() -> list[Record]:
    device, quick = open_gpu(), absl_flags.FLAGS.quick
    samples = 10 if quick else 40
    world = world_of(absl_flags.FLAGS.layers if not quick else 2)
    sheet = Sheet("step", device, 1, shape_of(world))
    abort = jax.block_until_ready(jnp.zeros(8, jnp.uint32))
    rate = read_rate(samples // 2)
    print(f"{device}: reads {rate / 1e12:.2f} TB/s; {shape_of(world)}", flush=True)
    begin_s, tables = time.perf_counter(), world.alone(0)
    arguments = world.arguments(tables)
    constant = world.call(tables, abort.unsafe_buffer_pointer())
    executables = compile_all(
        {
            "live": world.live(arguments),
            "fixed": world.fixed(arguments, constant),
            "reference": world.reference(arguments),
        }
    )
    print(f"compiled in {time.perf_counter() - begin_s:.1f} s", flush=True)
    live = live_of(world, executables["live"], world.dense(), world.bank(), abort)
    batch = world.batch()
    touched = check(live, executables["reference"], batch)
    size = bytes_of(world, touched, world.context_tokens)
    steps = {
        "live": live_steps(live, batch),
        "fixed": fixed_steps(live, executables["fixed"], batch),
    }
    runs = {name: Chained(s, start_of(world, batch, 8), STEPS) for name, s in steps.items()}
    timings = measure(runs, samples)
    for name, run in runs.items():
        if np.asarray(run.carry[3]).any():
            raise Unfit(f"{name}: a rank that is alone suspects a peer")
    del runs
    changes, compiled = measure_changes(live, batch, samples)
    timings |= changes
    bound_us = size.total / rate * 1e6
    add_rate(sheet, "read_rate", rate, samples // 2)
    add_records(sheet, world, timings, bound_us, compiled)
    report(world, timings, size, bound_us, compiled)
    if compiled:
        raise Unfit(f"{compiled} compilations while tables changed")
    return sheet.records


def report(world: World, timings: dict, size: StepBytes, bound_us: float, compiled: int) -> None:
    tokens, live, fixed = world.config.engine.batch_rows, timings["live"], timings["fixed"]
    ratio = live.p50_us / fixed.p50_us
    line = lambda name, timing: f"  {name:28} {timing.p50_us:9.1f} us p50 {timing.p99_us:9.1f} p99"
    print(
        f"step   B={tokens} L={world.config.model.layers}   bound {bound_us:.1f} us: experts "
        f"{size.experts / 1e9:.2f} + dense {size.dense / 1e9:.2f} + cache {size.cache / 1e9:.2f} GB"
    )
    print(line("live membership", live), f"  {tokens / live.p50_us * 1e6:,.0f} tokens/s")
    print(line("compiled-in membership", fixed))
    print(f"  ratio {ratio:.4f}, at most {AIM}: {command.verdict(ratio <= AIM)}")
    print(line("one step, waited for", timings["usual"]))
    print(line(f"a peer silent {SILENT_DEADLINE_MS} ms", timings["failing"]))
    print(line("the first step after it", timings["first"]))
    print(f"  compilations while members and tables changed: {compiled}", flush=True)
    for name in ("live", "fixed"):
        if timings[name].note:
            print(f"  {name}: {timings[name].note}", flush=True)


def define() -> None:
    command.define_gpu()
    absl_flags.DEFINE_integer("layers", LAYERS, "Layers of the model; 0 are all.", 0)


if __name__ == "__main__":
    define()
    command.run(main)
