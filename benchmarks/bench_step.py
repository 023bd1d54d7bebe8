"""A whole decode step of one rank that is alone, against one with its members compiled in.

    python -m benchmarks.bench_step --out=benchmarks/results/step.jsonl

The step is the one that serving compiles (`engine/step.py`). It is called again and again, each
time with what the one before gave back.
"""

import dataclasses
import functools
import math
import pathlib
import sys
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from absl import flags as absl_flags
from jax import lax

from benchmarks import options
from benchmarks.gpu_rates import rate_record, read_rate
from benchmarks.gpu_timing import (
    Chained,
    Program,
    Timing,
    Unfit,
    compile_all,
    measure,
    open_gpu,
    time_records,
)
from benchmarks.harness import Record, append
from eep_jax.config import RunConfig
from eep_jax.engine import step as step_module
from eep_jax.engine.engine import CompileCounter
from eep_jax.engine.step import COMPILER_OPTIONS, Batch, StepKind, empty_batch, make_step
from eep_jax.models.expert_bank import SlabLayout, slab_layout
from eep_jax.models.kv_cache import KVCache, empty_cache
from eep_jax.models.moe_block import ExpertSpread
from eep_jax.models.weights import dense_names
from eep_jax.storage.random_checkpoint import RandomCheckpoint
from eep_jax.tables import Tables, assign, call_of, solo_tables
from launch import flags
from pallas_kernels.call import Call
from pallas_kernels.expert_gemm.reference import expert_gemm_reference
from pallas_kernels.signals import first_round

CONFIG = "small_moe_h100x1"
LAYERS = 8  # of the model's, without --layers: each has kernels of its own to compile
RANK, SILENT = 0, 1
AIM = 1.01  # live membership over compiled-in
SILENT_DEADLINE_MS = 20
STEPS = 10  # of one run
AGREEING = 0.5  # of the tokens at least; by chance it is one of the vocabulary
AGREEING_MIN = 8  # tokens; of fewer, too many may be near a tie


@dataclasses.dataclass(frozen=True)
class World:
    """What is compiled for a rank of a configuration."""

    config: RunConfig

    @functools.cached_property
    def layout(self) -> SlabLayout:
        cluster = self.config.cluster
        return slab_layout(
            self.config.model, self.config.engine, cluster.ranks, cluster.slots_per_rank
        )

    @property
    def spread(self) -> ExpertSpread:
        return ExpertSpread(
            layout=self.layout.window,
            slots_per_rank=self.layout.slots,
            tile_rows=self.config.engine.row_tile,
        )

    def tables(self, epoch: int, *, others: tuple[int, ...] = (), shift: int = 0) -> Tables:
        """All experts on this rank, `shift` slots further; `others` are active, too."""
        cluster, experts = self.config.cluster, self.config.model.experts
        alone = solo_tables(cluster.ranks, experts, cluster.slots_per_rank, RANK)
        active = alone.active.copy()
        active[list(others)] = 1
        slots = alone.expert_slots.copy()
        slots[:, 0] = np.roll(slots[:, 0], shift)
        return dataclasses.replace(alone, epoch=np.uint32(epoch), active=active, expert_slots=slots)

    def call(self, tables: Tables, abort_address: np.ndarray, deadline_ms: int = 10_000) -> Call:
        """As `Engine` makes it, for the first step of the tables' epoch."""
        return dataclasses.replace(
            call_of(tables, RANK, deadline_ms, 0),
            round=np.uint32(first_round(int(tables.epoch))),
            vote=np.uint32(StepKind.DECODE),
            abort_address=abort_address,
        )

    @property
    def context_tokens(self) -> int:
        """How many tokens every sequence has, half of what there is room for."""
        return self.config.engine.context_tokens // 2

    def batch(self) -> Batch:
        """A decode step of all batch rows, each at the same position."""
        rows = self.config.engine.batch_rows
        return dataclasses.replace(
            empty_batch(self.config, StepKind.DECODE),
            tokens=(np.arange(rows) % self.config.model.vocab_size).astype(np.int32),
            batch_rows=np.arange(rows, dtype=np.int32),
            positions=np.full(rows, self.context_tokens - 1, np.int32),
            sampled=np.ones(rows, np.bool_),
        )

    def weight_shapes(self):
        """Shapes of the dense weights in the step's order, the bank, the cache and the heap."""
        dtype, of = jnp.dtype(self.config.engine.dtype), jax.ShapeDtypeStruct
        _, names = make_step(self.config, self.spread)
        shapes = dense_names(self.config.model)
        window = self.layout.window
        return (
            [of(shapes[name].shape, dtype) for name in names],
            of(self.layout.bank.shape, jnp.dtype(self.layout.bank.dtype)),
            jax.eval_shape(lambda: empty_cache(self.config.model, self.config.engine)),
            of((window.ranks, window.window_bytes), jnp.uint8),
        )


def world_of(layers: int) -> World:
    """The configuration with so many layers; 0 are all of them."""
    name = flags.CONFIG.value if absl_flags.FLAGS["config"].present else CONFIG
    config = flags.load_config(name)
    for text in flags.OVERRIDE.value:
        config = flags.override(config, text)
    if layers:
        model = dataclasses.replace(config.model, layers=min(layers, config.model.layers))
        config = dataclasses.replace(config, model=model)
    return World(config)


# Programs.


def live_program(world: World) -> Program:
    """What `Engine` compiles: everything of the cluster is an argument."""
    step, _ = make_step(world.config, world.spread)
    tables = world.tables(0)
    call = world.call(tables, np.zeros(2, np.uint32))
    dense, bank, cache, heap = world.weight_shapes()
    arguments = (dense, bank, cache, heap, tables, world.batch(), call)
    return Program(step, arguments, ("cache",), COMPILER_OPTIONS)


def fixed_program(world: World, abort_address: np.ndarray) -> Program:
    """The same step with tables, members, epoch, deadline and vote as constants."""
    step, _ = make_step(world.config, world.spread)
    tables = world.tables(0)
    constant = world.call(tables, abort_address)

    def fixed(dense, bank, cache, heap, batch, round, suspicion):
        members = jax.tree.map(jnp.asarray, constant)
        call = dataclasses.replace(members, round=round, suspicion=suspicion)
        return step(dense, bank, cache, heap, jax.tree.map(jnp.asarray, tables), batch, call)

    dense, bank, cache, heap = world.weight_shapes()
    arguments = (dense, bank, cache, heap, world.batch(), constant.round, constant.suspicion)
    return Program(fixed, arguments, ("cache",), COMPILER_OPTIONS)


def reference_program(world: World) -> Program:
    """The step with plain experts in the exchange's place; it also counts the slots of each layer.

    `(...) -> (result, touched [L])`, same arguments as the live one; the cache is not donated.
    """
    touched: list = []
    plain = functools.partial(plain_experts, touched)
    names = dict.fromkeys(("elastic_experts", "shared_elastic_experts"), plain)
    with mock.patch.multiple(step_module, **names):
        step, _ = make_step(world.config, world.spread)

    def run(*arguments):
        touched.clear()
        result = step(*arguments)
        return result, jnp.stack(touched)

    live = live_program(world)
    return Program(run, live.arguments, (), COMPILER_OPTIONS)


def plain_experts(touched, spread, layer, x, ids, weights, bank, heap, tables, call):
    """As `elastic_experts` for a rank that is alone, by the expert GEMM's reference in float32."""
    del heap
    slots = assign(ids, tables)
    local = jnp.where(slots >= 0, slots % spread.slots_per_rank, -1)
    wide = x.astype(jnp.float32)[None]

    def of_slot(carry, slot):
        total, used = carry
        mine = jnp.where(local == slot, slot * 0, -1)[None]
        start = (slot, layer, 0, 0, 0)
        expert = lax.dynamic_slice(bank, start, (1, 1, *bank.shape[2:]))[:, 0]
        y = expert_gemm_reference(wide, mine, expert.astype(jnp.float32))[0]
        return (total + y, used + (mine >= 0).any().astype(jnp.int32)), None

    zero = jnp.zeros((*ids.shape, x.shape[1]), jnp.float32)
    start = (zero, jnp.zeros((), jnp.int32))
    (results, used), _ = lax.scan(of_slot, start, jnp.arange(bank.shape[0], dtype=jnp.int32))
    touched.append(used)
    rounded = results.astype(jnp.bfloat16).astype(jnp.float32)
    y = jnp.einsum("tk,tkd->td", weights, rounded, precision="highest")
    return y, jnp.sum(slots < 0, axis=1, dtype=jnp.int32), call.next()


# What cannot be beaten.


@dataclasses.dataclass(frozen=True)
class StepBytes:
    """What a decode step has to read."""

    experts: int
    dense: int
    cache: int

    @property
    def total(self) -> int:
        return self.experts + self.dense + self.cache


def bytes_of(world: World, touched: list[int], context_tokens: int) -> StepBytes:
    """`touched` are slots with a row, of each layer; every sequence has so many tokens.

    The embedding is a few rows, so it is not counted.
    """
    model, engine = world.config.model, world.config.engine
    size = jnp.dtype(engine.dtype).itemsize
    _, matrices, width, hidden = world.layout.padded_shape
    dense = sum(
        math.prod(leaf.shape)
        for name, leaf in dense_names(model).items()
        if not name.endswith("/embedding")
    )
    per_token = 2 * model.layers * model.kv_heads * model.head_dim
    return StepBytes(
        experts=sum(touched) * matrices * width * hidden * size,
        dense=dense * size,
        cache=engine.batch_rows * context_tokens * per_token * size,
    )


# The run.


def make_cache(world: World, seed: int) -> KVCache:
    """Random keys and values."""
    shapes = jax.tree.leaves(jax.eval_shape(lambda: make_empty(world)))
    base = jax.random.normal(jax.random.key(seed), shapes[0].shape, shapes[0].dtype)
    make = jax.jit(lambda base: [base * (1 + index / 64) for index in range(len(shapes))])
    arrays = make(base)
    return KVCache(tuple(arrays[::2]), tuple(arrays[1::2]))


def make_empty(world: World) -> KVCache:
    return empty_cache(world.config.model, world.config.engine)


def make_bank(world: World, seed: int):
    """Random experts, drawn slot by slot."""
    slots, *shape = world.layout.bank.shape
    model, dtype = world.config.model, jnp.dtype(world.layout.bank.dtype)
    scale = np.array([model.hidden, model.hidden, model.expert_hidden], np.float32) ** -0.5

    def slot(key):
        normal = jax.random.normal(key, tuple(shape), dtype)
        return normal * jnp.asarray(scale, dtype)[None, :, None, None]

    keys = jax.random.split(jax.random.key(seed), slots)
    return jax.jit(lambda keys: lax.map(slot, keys))(keys)


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
    def abort_address(self) -> np.ndarray:
        return address_words(self.abort)

    def arguments(self, cache, tables: Tables, batch: Batch, call: Call):
        return self.dense, self.bank, cache, self.heap, tables, batch, call

    def run(self, cache, tables: Tables, batch: Batch, call: Call):
        """One step, waited for as `Engine` does."""
        result = self.executable(*self.arguments(cache, tables, batch, call))
        jax.block_until_ready(result.suspicion)
        return result


def address_words(array: jax.Array) -> np.ndarray:
    """Low and high half of where an array lies."""
    return np.array(divmod(array.unsafe_buffer_pointer(), 1 << 32)[::-1], np.uint32)


def check(live: Live, reference, batch: Batch) -> list[int]:
    """Compares a step with the reference; returns how many slots each layer touched.

    Raises Unfit. The second layer's keys and values depend on the first layer's experts alone, so
    they are close; later a rounding may move a token to another expert, so of the tokens only most
    must be equal.
    """
    world = live.world
    tables = world.tables(0)
    call = world.call(tables, live.abort_address)
    arguments = live.arguments(make_cache(world, 7), tables, batch, call)
    expected, touched = reference(*arguments)
    found = live.run(*arguments[2:3], tables, batch, call)
    if np.asarray(found.suspicion).any():
        raise Unfit(f"a rank that is alone suspects {np.flatnonzero(found.suspicion).tolist()}")
    layer = min(1, world.config.model.layers - 1)
    at = world.context_tokens - 1
    for name in ("keys", "values"):
        wanted, got = (
            np.asarray(getattr(r.cache, name)[layer][:, :, at], np.float32)
            for r in (expected, found)
        )
        error = np.sqrt(np.mean((wanted - got) ** 2) / np.mean(wanted**2))
        if not error < 0.02:
            raise Unfit(f"{name} of layer {layer} differ from the reference by {error:.3g} of it")
    agreeing = float(np.mean(np.asarray(expected.tokens) == np.asarray(found.tokens)))
    print(f"tokens equal to the reference: {agreeing:.0%}", flush=True)
    if len(batch.batch_rows) >= AGREEING_MIN and agreeing < AGREEING:
        raise Unfit(f"only {agreeing:.0%} of the tokens are those of the reference")
    return np.asarray(touched).tolist()


def live_steps(live: Live, batch: Batch):
    """STEPS steps, `state -> state`: (cache, tokens, round, suspicion)."""
    tables = jax.device_put(live.world.tables(0))
    call = jax.device_put(live.world.call(live.world.tables(0), live.abort_address))
    batch = jax.device_put(batch)

    def run(state):
        for _ in range(STEPS):
            cache, tokens, round_, suspicion = state
            result = live.executable(
                *live.arguments(
                    cache,
                    tables,
                    dataclasses.replace(batch, tokens=tokens),
                    dataclasses.replace(call, round=round_, suspicion=suspicion),
                )
            )
            state = result.cache, result.tokens, result.round, result.suspicion
        return state

    return run


def fixed_steps(live: Live, executable, batch: Batch):
    batch = jax.device_put(batch)

    def run(state):
        for _ in range(STEPS):
            cache, tokens, round_, suspicion = state
            following = dataclasses.replace(batch, tokens=tokens)
            given = (live.dense, live.bank, cache, live.heap, following, round_, suspicion)
            result = executable(*given)
            state = result.cache, result.tokens, result.round, result.suspicion
        return state

    return run


def start_of(world: World, batch: Batch, seed: int):
    call = world.call(world.tables(0), np.zeros(2, np.uint32))
    return (
        make_cache(world, seed),
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
    cache = make_cache(world, 8)
    before, times = counter.total, {"usual": [], "failing": [], "first": []}
    silent = {"usual": (), "failing": (SILENT,), "first": ()}
    for epoch, name in enumerate(list(times) * samples, 1):
        tables = world.tables(epoch, others=silent[name], shift=epoch)
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


def shape_of(world: World) -> dict:
    model, engine = world.config.model, world.config.engine
    return {
        "tokens": engine.batch_rows,
        "context_tokens": world.context_tokens,
        "layers": model.layers,
        "hidden": model.hidden,
        "expert_hidden": model.expert_hidden,
        "experts": model.experts,
        "slots": world.layout.slots,
        "top_k": model.experts_per_token,
        "dtype": engine.dtype,
    }


def step_records(world: World, device: str, timings: dict, bound_us: float, compiled: int):
    """`timings` by name: live, fixed, usual, failing, first."""
    shape = shape_of(world)
    fields = {"bench": "step", "device": device, "ranks": 1, "shape": shape}
    records = time_records(timings["live"], baseline=timings["fixed"], bound=bound_us, **fields)
    records += time_records(timings["usual"], metric="latency", bound=bound_us, **fields)
    records += time_records(
        timings["first"],
        baseline=timings["usual"],
        metric="latency_after_failure",
        bound=bound_us,
        **fields,
    )
    records += time_records(timings["failing"], metric="latency_silent_peer", **fields)
    shape = shape | {"samples": len(timings["live"].samples_us)}
    of_step = {"bench": "step", "device": device, "ranks": 1, "shape": shape}
    tokens = world.config.engine.batch_rows
    rate = tokens / timings["live"].p50_us * 1e6
    best = tokens / bound_us * 1e6
    records.append(
        Record(metric="tokens_per_s", value=rate, unit="tokens/s", bound=best, **of_step)
    )
    records.append(Record(metric="compilations", value=compiled, unit="", bound=0, **of_step))
    return records


def main() -> int:
    device = open_gpu()
    quick = absl_flags.FLAGS.quick
    samples = 10 if quick else 40
    world = world_of(absl_flags.FLAGS.layers if not quick else 2)
    abort = jax.block_until_ready(jnp.zeros(8, jnp.uint32))
    rate = read_rate(samples // 2)
    print(f"{device}: reads {rate / 1e12:.2f} TB/s; {shape_of(world)}", flush=True)
    begin_s = time.perf_counter()
    executables = compile_all(
        {
            "live": live_program(world),
            "fixed": fixed_program(world, address_words(abort)),
            "reference": reference_program(world),
        }
    )
    print(f"compiled in {time.perf_counter() - begin_s:.1f} s", flush=True)
    dtype = jnp.dtype(world.config.engine.dtype)
    _, names = make_step(world.config, world.spread)
    drawn = RandomCheckpoint(world.config.model, 0).read_dense()
    live = Live(
        world=world,
        executable=executables["live"],
        dense=[jnp.asarray(drawn[name].astype(dtype)) for name in names],
        bank=make_bank(world, 1),
        heap=jnp.zeros((world.layout.window.ranks, world.layout.window.window_bytes), jnp.uint8),
        abort=abort,
    )
    batch = world.batch()
    try:
        touched = check(live, executables["reference"], batch)
        size = bytes_of(world, touched, world.context_tokens)
        runs = {
            "live": Chained(live_steps(live, batch), start_of(world, batch, 8), STEPS),
            "fixed": Chained(
                fixed_steps(live, executables["fixed"], batch), start_of(world, batch, 8), STEPS
            ),
        }
        timings = measure(runs, samples)
        for name, run in runs.items():
            if np.asarray(run.carry[3]).any():
                raise Unfit(f"{name}: a rank that is alone suspects someone")
        del runs
        changes, compiled = measure_changes(live, batch, samples)
    except Unfit as error:
        print(f"no result: {error}", file=sys.stderr)
        return 1
    timings |= changes
    bound_us = size.total / rate * 1e6
    records = [rate_record(device, "read_rate", rate, samples // 2)]
    records += step_records(world, device, timings, bound_us, compiled)
    report(world, timings, size, bound_us, compiled)
    if compiled:
        print(f"no result: {compiled} compilations while tables changed", file=sys.stderr)
        return 1
    if absl_flags.FLAGS.out:
        append(pathlib.Path(absl_flags.FLAGS.out), records)
        print(f"appended {len(records)} records to {absl_flags.FLAGS.out}")
    return 0


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
    print(f"  ratio {ratio:.4f}, at most {AIM}: {'reached' if ratio <= AIM else 'MISSED'}")
    print(line("one step, waited for", timings["usual"]))
    print(line(f"a peer silent {SILENT_DEADLINE_MS} ms", timings["failing"]))
    print(line("the first step after it", timings["first"]))
    print(f"  compilations while members and tables changed: {compiled}", flush=True)
    for name in ("live", "fixed"):
        if timings[name].note:
            print(f"  {name}: {timings[name].note}", flush=True)


def define() -> None:
    options.define()
    absl_flags.DEFINE_integer("layers", LAYERS, "Layers of the model; 0 are all.", 0)


if __name__ == "__main__":
    define()
    sys.exit(app.run(flags.main_with_usage(main)))
