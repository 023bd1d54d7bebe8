"""One rank of `bench_wide_decode`: all systems of one batch size in one process, timed in turn.

    python -m benchmarks.wide.decode_rank DIRECTORY RANK PARENT_PID   # bench_wide_decode starts it

First a model of few layers: every system's keys, values and tokens are compared with plain experts.
Then the whole stack: its tokens are compared between systems, and blocks of steps alternate.
"""

import dataclasses
import json
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.gpu_rates import read_rate
from benchmarks.gpu_timing import compile_all, shapes_of
from benchmarks.gpu_trace import run_kernels, shares
from benchmarks.static.engine import mesh_of
from benchmarks.static.exchanges import AXIS
from benchmarks.wide.decode import (
    CHECKED_MOE_LAYERS,
    ELASTIC,
    World,
    once_tables,
    own_part,
    split_of,
    with_few_experts,
    with_sizes,
)
from benchmarks.wide.exchange_rank import Out
from benchmarks.wide.meeting import Meeting
from benchmarks.wide.workers import JOB
from eep_jax.heap.arrays import device_array, heap_argument
from eep_jax.heap.open import open_heap
from launch.flags import load_config, override
from launch.processes import end_with_parent

WARM_BLOCKS = 1
CHECKED_BATCH, CHECKED_BYTES_MAX = 16, 4 << 30
READ_SAMPLES, PROFILED_STEPS = 5, 2
AGREEING = 0.5  # of the tokens at least; later a rounding may move a token to another expert
AGREEING_MIN = 8  # tokens; of fewer, too many may be near a tie
CLOSE = 0.03  # of keys and values after the first expert layer: results are rounded to bfloat16


class Unfit(Exception):
    """An answer was wrong, so its time means nothing."""


@dataclasses.dataclass(frozen=True)
class Jitted:
    """As `gpu_timing.Program`, of a function that is jitted already."""

    function: Callable
    arguments: tuple

    def trace(self):
        return self.function.trace(*self.arguments)


class Systems:
    """The arrays of one rank and one configuration, and the steps that are compared.

    A state is (cache, tokens, round, suspicion); a step gives the next one.
    """

    def __init__(self, world: World, names, meeting: Meeting, name: str):
        self.world, self.name, self.meeting = world, name, meeting
        config = world.config
        self.heap = open_heap(
            world.rank, config.cluster.ranks, world.layout.slab_bytes, jax.default_backend()
        )
        self._fill_bank()
        for peer, handle in enumerate(meeting.share(f"{name}.handle", self.heap.export())):
            if peer != world.rank:
                self.heap.attach(peer, handle)
        meeting.share(f"{name}.attached")
        self.bank = device_array(self.heap, world.layout.bank)
        self._argument = heap_argument(self.heap)
        self.dense = world.dense()
        self.batch = jax.device_put(world.batch())
        self._steps: dict[str, Callable] = {}
        self._compile(names)

    def close(self) -> None:
        self.meeting.share(f"{self.name}.done")
        self._steps.clear()
        del self.bank, self._argument, self.dense, self.batch
        self.heap.release() if hasattr(self.heap, "release") else self.heap.close()

    @property
    def names(self) -> list[str]:
        return list(self._steps)

    def step(self, name: str, state):
        return self._steps[name](state)

    def start(self, seed: int):
        world, ranks = self.world, self.world.config.cluster.ranks
        tokens = jnp.array(world.batch().tokens)
        return world.cache(seed), tokens, jnp.uint32(0), jnp.zeros(ranks, jnp.int32)

    def _fill_bank(self) -> None:
        """Draws each expert on the device and copies it into its slot."""
        world, slots = self.world, self.world.layout.slots
        for slot in range(slots):
            expert = world.rank * slots + slot
            if expert >= world.config.model.experts:
                continue
            drawn = jax.block_until_ready(world.draw_expert(expert))
            region = world.layout.slot(slot)
            if self.heap.device == "cpu":
                self.heap.write(region.offset, np.asarray(drawn))
            else:
                self._copy(drawn, region)

    def _copy(self, drawn: jax.Array, region) -> None:
        from eep_jax.heap.libcuda import Device

        what = f"an expert of rank {self.world.rank}"
        device = Device(0, what)
        target = self.heap.base + self.world.rank * self.heap.slab_bytes + region.offset
        device.copy([(target, drawn.unsafe_buffer_pointer(), region.bytes)], what)
        device.close()

    # Programs.

    def _compile(self, names) -> None:
        """What cannot be compiled at one rank is left out by all."""
        world, begin_s = self.world, time.monotonic()
        arguments = self.shapes()
        address = self.heap.control_address()
        programs: dict = {}
        if "live" in names:
            programs["live"] = world.live(arguments, self.heap.slab_bytes)
        if "fixed" in names:
            programs["fixed"] = world.fixed(arguments, self.heap.slab_bytes, address)
        mesh = placed = None
        if static := [name for name in names if name not in ELASTIC]:
            mesh = mesh_of(jax.devices())
            placed = self._placed(mesh)
            dense, bank, batch = placed
            like = dense, bank, self._cache_shapes(mesh), batch
            programs |= {name: Jitted(world.static(name, mesh), like) for name in static}
        failures: dict[str, Exception] = {}
        executables = compile_all(programs, failures)
        found = {
            name: self._elastic(name, run) if name in ELASTIC else self._static(mesh, run, placed)
            for name, run in executables.items()
        }
        for name, error in failures.items():
            print(f"{self.name} {name}: {type(error).__name__}: {error}", file=sys.stderr)
        known = self.meeting.share(f"{self.name}.compiled", sorted(found))
        self.failures = {name: f"{type(e).__name__}: {e}" for name, e in failures.items()}
        everyone = set.intersection(*map(set, known))
        self._steps = {name: found[name] for name in names if name in everyone}
        print(f"{self.name}: compiled in {time.monotonic() - begin_s:.1f} s", flush=True)

    def shapes(self) -> tuple:
        world = self.world
        cache = jax.eval_shape(lambda: world.cache(0))
        tables = once_tables(world.config, 1)
        call = world.call("live", 0)
        heap = jax.ShapeDtypeStruct(self._argument.shape, self._argument.dtype)
        dense, bank = shapes_of(self.dense), shapes_of(self.bank)
        return dense, bank, cache, heap, tables, world.batch(), call

    def _elastic(self, name: str, run):
        tables = jax.device_put(once_tables(self.world.config, 1))
        call = jax.device_put(self.world.call(name, self.heap.control_address()))
        rounds = [call.round]  # goes on from step to step, whoever begins anew

        def step(state):
            cache, tokens, _, suspicion = state
            batch = dataclasses.replace(self.batch, tokens=tokens)
            if name == "live":
                told = dataclasses.replace(call, round=rounds[0], suspicion=suspicion)
                result = run(self.dense, self.bank, cache, self._argument, tables, batch, told)
            else:
                given = (self.dense, self.bank, cache, self._argument, batch)
                result = run(*given, rounds[0], suspicion)
            rounds[0] = result.round
            return result.cache, result.tokens, result.round, result.suspicion

        return step

    def _placed(self, mesh):
        """Dense weights, bank and batch over the mesh; the memory is the elastic systems'."""
        dense = [split_of(mesh, array, whole=True) for array in self.dense]
        batch = jax.tree.map(lambda array: split_of(mesh, array), self.batch)
        return dense, split_of(mesh, self.bank), batch

    def _cache_shapes(self, mesh):
        split = NamedSharding(mesh, P(AXIS))
        whole = lambda leaf: (leaf.shape[0] * mesh.size, *leaf.shape[1:])
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(whole(leaf), leaf.dtype, sharding=split),
            jax.eval_shape(lambda: self.world.cache(0)),
        )

    def _static(self, mesh, run, placed):
        dense, bank, batch = placed

        def step(state):
            cache, tokens, round_, suspicion = state
            spread = jax.tree.map(lambda array: split_of(mesh, array), cache)
            mine = dataclasses.replace(batch, tokens=split_of(mesh, tokens))
            tokens, cache = run(dense, bank, spread, mine)
            return jax.tree.map(own_part, cache), own_part(tokens), round_, suspicion

        return step


def check_short(config, rank: int, names, meeting: Meeting, name: str) -> list[str]:
    """Compares all systems of a short stack with plain experts; what is wrong, at this rank."""
    dense = min(config.model.dense_layers, 1)
    sizes = {"ranks": config.cluster.ranks, "batch": config.engine.batch_slots}
    sizes |= {"context_tokens": config.engine.context_tokens}
    short = with_sizes(config, layers=dense + CHECKED_MOE_LAYERS, **sizes)
    # Plain experts are all on one rank.
    world = World(with_few_experts(short, config.cluster.ranks, CHECKED_BYTES_MAX), rank)
    systems = Systems(world, names, meeting, name)
    experts = jnp.stack([world.draw_expert(e) for e in range(world.config.model.experts)])
    shapes = systems.shapes()
    program = world.reference(shapes, shapes_of(experts))
    cache = world.cache(7)
    reference = compile_all({"": program})[""]
    wanted = reference(systems.dense, experts, cache, systems.batch)
    wrong = [f"{system}: {error}" for system, error in systems.failures.items()]
    for system in systems.names:
        _, _, round_, suspicion = systems.start(7)
        state = (world.cache(7), jnp.array(world.batch().tokens), round_, suspicion)
        found = jax.block_until_ready(systems.step(system, state))
        wrong += [f"{system}: {text}" for text in _compare(world, wanted, found)]
    systems.close()
    return wrong


def _compare(world: World, wanted, found) -> list[str]:
    """The last layer's keys and values depend on the experts of the layers before."""
    tokens, cache = wanted
    wrong, layer = [], world.config.model.layers - 1
    if np.asarray(found[3]).any():
        wrong.append(f"suspects {np.flatnonzero(found[3]).tolist()}")
    for name in ("keys", "values"):
        right, got = (
            np.asarray(getattr(c, name)[layer][:, :, world.at], np.float32)
            for c in (cache, found[0])
        )
        error = float(np.sqrt(np.mean((right - got) ** 2) / np.mean(right**2)))
        if not error < CLOSE:
            wrong.append(f"{name} of layer {layer} are off by {error:.3g} of the reference")
    share = float(np.mean(np.asarray(tokens) == np.asarray(found[1])))
    if len(tokens) >= AGREEING_MIN and share < AGREEING:
        wrong.append(f"only {share:.0%} of the tokens are the reference's")
    return wrong


def measure(config, rank: int, job: dict, meeting: Meeting, out: Out, name: str) -> None:
    """Times all systems of one configuration; writes what was found."""
    world = World(config, rank)
    systems = Systems(world, job["systems"], meeting, name)
    for system, error in systems.failures.items():
        out.write(kind="failure", family=name, what=system, error=error[:600])
    names, samples, steps = systems.names, {s: [] for s in systems.names}, job["steps"]
    agreeing, first = {}, None
    for system in names:
        state = systems.step(system, systems.start(7))
        tokens = np.asarray(state[1])
        first = tokens if first is None else first
        agreeing[system] = float(np.mean(tokens == first))
        del state
    states = systems.start(7)
    for block in range(job["samples"] + WARM_BLOCKS):
        turn = block % max(1, len(names))
        for system in names[turn:] + names[:turn]:
            states = jax.block_until_ready(systems.step(system, states))  # everybody is there
            begin_s = time.perf_counter()
            for _ in range(steps):
                states = systems.step(system, states)
            jax.block_until_ready(states)
            if block >= WARM_BLOCKS:
                samples[system].append((time.perf_counter() - begin_s) / steps * 1e6)
    states = _profile(systems, states, out, name)
    if np.asarray(states[3]).any():
        raise Unfit(f"rank {rank} suspects {np.flatnonzero(states[3]).tolist()}")
    del states
    for system in names:
        out.write(
            kind="step",
            family=name,
            name=system,
            batch=config.engine.batch_slots,
            layers=config.model.layers,
            samples_us=samples[system],
            agreeing=agreeing[system],
        )
    systems.close()


def _profile(systems: Systems, states, out: Out, name: str):
    """What kernels a step of `live` consists of, as rank 0 sees it; all ranks take the steps."""
    if "live" not in systems.names or jax.default_backend() != "gpu":
        return states
    held = [states]

    def run():
        for _ in range(PROFILED_STEPS):
            held[0] = systems.step("live", held[0])
        return held[0]

    if systems.world.rank:
        return jax.block_until_ready(run())
    before = states
    try:
        out.write(kind="profile", family=name, shares=shares(run_kernels(run)))
    except Exception as error:  # the profiler's own troubles end no measurement
        print(f"{name}: no profile: {error}", file=sys.stderr, flush=True)
        if held[0] is before:
            run()  # the others wait for these steps
    return jax.block_until_ready(held[0])


def main(directory: pathlib.Path, rank: int, parent_pid: int) -> None:
    end_with_parent(parent_pid)
    job = json.loads((directory / JOB).read_text())
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if any(system not in ELASTIC for system in job["systems"]):
        jax.distributed.initialize(
            job["coordinator"], job["ranks"], rank, initialization_timeout=90
        )
    if jax.default_backend() != job["platform"]:
        raise RuntimeError(f"JAX computes on {jax.default_backend()}, not on {job['platform']}")
    config = override(load_config(job["config"]), *job["overrides"])
    meeting = Meeting(directory / "meeting", rank, job["ranks"], job["deadline_s"])
    out = Out(directory / f"found.{rank}.jsonl")
    if job["platform"] == "gpu":
        out.write(kind="read", bytes_per_s=read_rate(READ_SAMPLES))
    every = [with_sizes(config, ranks=job["ranks"], **sizes) for sizes in job["sizes"]]
    # Of a few tokens too many may be near a tie, and of many the reference takes long.
    checked = min(every, key=lambda c: abs(c.engine.batch_slots - CHECKED_BATCH))
    wrong = check_short(checked, rank, job["systems"], meeting, "short")
    everyone = meeting.share("short.wrong", wrong)
    if any(everyone):
        told = [f"rank {r}: {text}" for r, texts in enumerate(everyone) for text in texts]
        if rank == 0:
            out.write(kind="failure", family="short", what="check", error="; ".join(told)[:900])
        raise Unfit("; ".join(told))
    for index, sized in enumerate(every):
        measure(sized, rank, job, meeting, out, f"size{index}")
    out.write(kind="end")


if __name__ == "__main__":
    try:
        main(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # leaving in order could wait for a kernel that waits for a peer
    os._exit(0)  # threads of XLA may be inside a callback
