"""A decode step whose experts are spread over a fixed mesh, exchanged by XLA's collectives."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.static.exchanges import AXIS, as_run_experts, no_call
from benchmarks.world import World
from eep_jax.engine.step import COMPILER_OPTIONS, make_step
from eep_jax.models.moe_block import expert_mlp


def static_step(world: World, exchange: str, mesh):
    """One program of all ranks over `mesh`, jitted: `(dense, bank, cache, batch) -> (tokens,
    cache)`; of the bank, the cache and the batch each rank has its part along the first axis.
    """
    config = world.config
    ranks, tile = config.cluster.ranks, config.engine.row_tile
    run = as_run_experts(exchange, ranks, tile, expert_mlp(config.model))
    step, _ = make_step(config, None, run)
    unused = world.together(0)

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
