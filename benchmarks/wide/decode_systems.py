"""The arrays of one rank of a decoding stack, and the steps of all systems over them."""

import dataclasses
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.gpu_timing import compile_all
from benchmarks.meeting import Meeting, release
from benchmarks.static.engine import mesh_of
from benchmarks.static.exchanges import AXIS
from benchmarks.wide.decode import own_part, split_of, static_step
from benchmarks.wide.decode_sizes import ELASTIC
from benchmarks.world import World
from eep_jax.heap.arrays import device_array, heap_argument
from eep_jax.heap.cuda.libcuda import Device

EPOCHS = {"live": 1, "fixed": 2}  # of their own: no flag of one is ever right for the other


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
        self.heap = meeting.open_heap(name, world.layout.slab_bytes, self._fill_bank)
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
        release(self.heap)

    @property
    def names(self) -> list[str]:
        return list(self._steps)

    def step(self, name: str, state):
        return self._steps[name](state)

    def start(self, seed: int):
        world, ranks = self.world, self.world.config.cluster.ranks
        tokens = jnp.array(world.batch().tokens)
        return world.cache(seed), tokens, jnp.uint32(0), jnp.zeros(ranks, jnp.int32)

    def _fill_bank(self, heap) -> None:
        """Draws each expert on the device and copies it into its slot."""
        world, slots = self.world, self.world.layout.slots
        for slot in range(slots):
            expert = world.rank * slots + slot
            if expert >= world.config.model.experts:
                continue
            drawn = jax.block_until_ready(world.draw_experts([expert]))
            region = world.layout.slot(slot)
            if heap.device == "cpu":
                heap.write(region.offset, np.asarray(drawn[0]))
            else:
                self._copy(heap, drawn, region)

    def _copy(self, heap, drawn: jax.Array, region) -> None:
        what = f"an expert of rank {self.world.rank}"
        device = Device(0, what)
        target = heap.base + self.world.rank * heap.slab_bytes + region.offset
        device.copy([(target, drawn.unsafe_buffer_pointer(), region.bytes)], what)
        device.close()

    # Programs.

    def _compile(self, names) -> None:
        """Compiles the systems; all ranks leave out those that one rank cannot compile."""
        world, begin_s = self.world, time.monotonic()
        arguments = self.shapes()
        address = self.heap.control_address()
        programs: dict = {}
        if "live" in names:
            programs["live"] = world.live(arguments, self.heap.slab_bytes)
        if "fixed" in names:
            call = world.call(world.together(EPOCHS["fixed"]), address)
            programs["fixed"] = world.fixed(arguments, call, self.heap.slab_bytes)
        mesh = placed = None
        if static := [name for name in names if name not in ELASTIC]:
            mesh = mesh_of(jax.devices())
            placed = self._placed(mesh)
            dense, bank, batch = placed
            like = dense, bank, self._cache_shapes(mesh), batch
            programs |= {name: Jitted(static_step(world, name, mesh), like) for name in static}
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
        heap = jax.ShapeDtypeStruct(self._argument.shape, self._argument.dtype)
        return self.world.arguments(self.world.together(EPOCHS["live"]), heap)

    def _elastic(self, name: str, run):
        tables = self.world.together(EPOCHS[name])
        call = jax.device_put(self.world.call(tables, self.heap.control_address()))
        tables = jax.device_put(tables)
        rounds = [call.round]  # continues from step to step, also with a new state

        def step(state):
            cache, tokens, _, suspicion = state
            batch = dataclasses.replace(self.batch, tokens=tokens)
            if name == "live":
                dynamic = dataclasses.replace(call, round=rounds[0], suspicion=suspicion)
                result = run(self.dense, self.bank, cache, self._argument, tables, batch, dynamic)
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
            self.world.cache_shapes(),
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
