"""A decode step of one rank among others, by elastic exchanges or by XLA's collectives.

All systems share memory: one bank (in the heap), one set of dense weights, one cache that each
takes and gives back. Expert e is in slot `e % S` of rank `e // S`, once, for all of them. Weights
are drawn on the device from seeds, so each rank can draw any expert.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import bench_step
from benchmarks.gpu_timing import Program
from benchmarks.static.exchanges import AXIS, as_run_experts, no_call
from benchmarks.wide.decode_sizes import STEP_DEADLINE_MS
from eep_jax.config import RunConfig
from eep_jax.engine.step import (
    COMPILER_OPTIONS,
    Batch,
    StepKind,
    empty_batch,
    make_step,
)
from eep_jax.models.expert_bank import SlabLayout, slab_layout
from eep_jax.models.kv_cache import KVCache, empty_cache
from eep_jax.models.moe_block import ExpertSpread, expert_mlp
from eep_jax.models.weights import dense_names
from eep_jax.tables import NO_SLOT, Tables, call_of, solo_tables
from pallas_kernels.call import Call
from pallas_kernels.signals import first_round

EPOCHS = {"live": 1, "fixed": 2}  # of their own: no flag of one is ever right for the other


def once_tables(config: RunConfig, epoch: int) -> Tables:
    """All ranks are in; expert e is where static sharding has it."""
    cluster, experts = config.cluster, config.model.experts
    slots = np.full((experts, cluster.ranks), NO_SLOT, np.int32)
    slots[:, 0] = np.arange(experts)
    return Tables(
        epoch=np.uint32(epoch),
        active=np.ones(cluster.ranks, np.int32),
        expert_slots=slots,
        replicas=np.ones(experts, np.int32),
    )


@dataclasses.dataclass(frozen=True)
class World:
    """What is compiled at one rank of a configuration."""

    config: RunConfig
    rank: int

    @functools.cached_property
    def layout(self) -> SlabLayout:
        cluster = self.config.cluster
        return slab_layout(
            self.config.model, self.config.engine, cluster.ranks, cluster.slots_per_rank
        )

    def spread(self, slab_bytes: int) -> ExpertSpread:
        return ExpertSpread(
            layout=self.layout.window,
            slots_per_rank=self.layout.slots,
            tile_rows=self.config.engine.row_tile,
            mlp=expert_mlp(self.config.model),
            slab_bytes=slab_bytes,
        )

    @property
    def at(self) -> int:
        """The position of the token of this step, in every sequence."""
        return self.config.engine.context_tokens // 2

    def batch(self) -> Batch:
        rows = self.config.engine.batch_rows
        first = self.rank * rows
        return dataclasses.replace(
            empty_batch(self.config, StepKind.DECODE),
            tokens=((first + np.arange(rows)) * 97 % self.config.model.vocab_size).astype(np.int32),
            slots=np.arange(rows, dtype=np.int32),
            positions=np.full(rows, self.at, np.int32),
            sampled=np.ones(rows, np.bool_),
        )

    def call(self, system: str, abort_address: int) -> Call:
        tables = once_tables(self.config, EPOCHS[system])
        call = call_of(tables, self.rank, STEP_DEADLINE_MS, abort_address)
        first = np.uint32(first_round(EPOCHS[system]))
        return dataclasses.replace(call, round=first, vote=np.uint32(StepKind.DECODE))

    # Weights, drawn on the device.

    def dense(self) -> list[jax.Array]:
        """The step's dense weights, in its order; equal on all ranks."""
        names, shapes = make_step(self.config, None)[1], dense_names(self.config.model)
        return [
            self._dense(index, name, shapes[name].shape, dtype)
            for index, (name, dtype) in enumerate(names.items())
        ]

    def _dense(self, index: int, name: str, shape, dtype) -> jax.Array:
        if name.endswith("/scale"):
            return jnp.ones(shape, dtype)
        if name.endswith(("/bias", "/sinks", "/router_correction")):
            return jnp.zeros(shape, dtype)
        scale = 1.0 if name.endswith("/embedding") else shape[-2] ** -0.5
        return _normal(jax.random.key(index), np.float32(scale), tuple(shape), jnp.dtype(dtype))

    def draw_expert(self, expert: int) -> jax.Array:
        """`[L 3 F D]` of the bank, zero where it is padded."""
        layout = self.layout
        dtype = jnp.dtype(layout.bank.dtype)
        return _expert(
            np.uint32(expert), layout.padded_shape, self.config.model.expert_hidden, dtype
        )

    def cache(self, seed: int) -> KVCache:
        """Random keys and values; every rank has its own."""
        shapes, tree = jax.tree.flatten(
            jax.eval_shape(lambda: empty_cache(self.config.model, self.config.engine))
        )
        key = jax.random.fold_in(jax.random.key(seed), self.rank)
        one = np.float32(1)
        drawn = [
            _normal(jax.random.fold_in(key, index % 4), one, leaf.shape, leaf.dtype)
            for index, leaf in enumerate(shapes)
        ]
        return jax.tree.unflatten(tree, drawn)

    # Programs.

    def live(self, arguments: tuple, slab_bytes: int) -> Program:
        """The step that serving compiles: everything of the cluster is an argument."""
        step, _ = make_step(self.config, self.spread(slab_bytes))
        return Program(step, arguments, ("cache",), COMPILER_OPTIONS)

    def fixed(self, arguments: tuple, slab_bytes: int, abort_address: int) -> Program:
        """The same with tables, members, epoch, deadline and addresses compiled in."""
        step, _ = make_step(self.config, self.spread(slab_bytes))
        tables = once_tables(self.config, EPOCHS["fixed"])
        constant = self.call("fixed", abort_address)

        def fixed(dense, bank, cache, heap, batch, round, suspicion):
            call = jax.tree.map(jnp.asarray, constant)
            call = dataclasses.replace(call, round=round, suspicion=suspicion)
            return step(dense, bank, cache, heap, jax.tree.map(jnp.asarray, tables), batch, call)

        dense, bank, cache, heap, _, batch, call = arguments
        given = (dense, bank, cache, heap, batch, call.round, call.suspicion)
        return Program(fixed, given, ("cache",), COMPILER_OPTIONS)

    def static(self, exchange: str, mesh):
        """One program of all ranks over `mesh`, jitted: `(dense, bank, cache, batch) -> (tokens,
        cache)`; of the bank, the cache and the batch each rank has its part along the first axis.
        """
        ranks, engine = self.config.cluster.ranks, self.config.engine
        run = as_run_experts(exchange, ranks, engine.row_tile, expert_mlp(self.config.model))
        step, _ = make_step(self.config, None, run)
        unused = once_tables(self.config, 0)

        def local(dense, bank, cache, batch):
            tables = jax.tree.map(jnp.asarray, unused)
            result = step(dense, bank, cache, None, tables, batch, no_call())
            return result.tokens, result.cache

        part = P(AXIS)
        spread = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P(), part, part, part),
            out_specs=(part, part),
            check_vma=False,
        )
        return jax.jit(spread, donate_argnums=2, compiler_options=COMPILER_OPTIONS)

    def reference(self, arguments: tuple, bank) -> Program:
        """The step with plain experts, all `[E L 3 F D]` on this rank: `-> (tokens, cache)`."""
        experts = self.config.model.experts
        touched: list = []
        plain = functools.partial(bench_step.plain_experts, touched)
        spread = dataclasses.replace(self.spread(0), slots_per_rank=experts)
        step, _ = make_step(self.config, spread, plain)
        alone = solo_tables(1, experts, experts, 0)

        def run(dense, bank, cache, batch):
            touched.clear()
            tables = jax.tree.map(jnp.asarray, alone)
            result = step(dense, bank, cache, None, tables, batch, no_call())
            return result.tokens, result.cache

        dense, _, cache, _, _, batch, _ = arguments
        return Program(run, (dense, bank, cache, batch), (), COMPILER_OPTIONS)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _normal(key, scale, shape, dtype):
    return (jax.random.normal(key, shape, jnp.float32) * scale).astype(dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _expert(number, shape, width, dtype):
    layers, matrices, padded, hidden = shape
    key = jax.random.fold_in(jax.random.key(0xE), number)
    scale = jnp.array([hidden, hidden, width], jnp.float32) ** -0.5
    real = (jnp.arange(padded) < width)[None, :, None]

    def layer(key):
        normal = jax.random.normal(key, (matrices, padded, hidden), jnp.float32)
        return jnp.where(real, normal * scale[:, None, None], 0).astype(dtype)

    return lax.map(layer, jax.random.split(key, layers))


def split_of(mesh, array, whole: bool = False):
    """This process's part of an array over the mesh, split along its first axis (or the same on
    all, `whole`), without a copy of what is on the device already."""
    here = jax.device_put(array, jax.local_devices()[0])
    if whole:
        return jax.make_array_from_single_device_arrays(
            here.shape, NamedSharding(mesh, P()), [here]
        )
    shape = (here.shape[0] * mesh.size, *here.shape[1:])
    return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, P(AXIS)), [here])


def own_part(array):
    return array.addressable_data(0)
