"""Each static exchange gives what all experts in one process give, under `vmap` as the mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from benchmarks.static import exchanges
from benchmarks.static.exchanges import AXIS, Experts, exchange, pack, slots_of, unpack
from eep_jax.models.moe_block import dense_experts

R, T, K, D, F, L, E = 3, 5, 2, 16, 8, 2, 8  # E is no multiple of R: one slot stays empty
S = slots_of(E, R)


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    ids = np.stack([[rng.permutation(E)[:K] for _ in range(T)] for _ in range(R)]).astype(np.int32)
    ids[1, 2] = -1  # an empty row goes nowhere
    ids[2, :, :] = [1, 0]  # all of a rank's tokens to one rank
    experts = normal(E, L, 3, F, D)
    bank = np.full((R * S, L, 3, F, D), np.nan, np.float32)
    bank[:E] = experts
    return normal(R, T, D), ids, normal(R, T, K), experts, bank.reshape(R, S, L, 3, F, D)


def on_every_rank(name: str, world, layer: int):
    x, ids, weights, _, bank = world
    run = lambda x, ids, weights, bank: exchange(name)(
        x, ids, weights, Experts(bank, layer, R, tile_rows=4)
    )
    return jax.jit(jax.vmap(run, axis_name=AXIS))(x, ids, weights, bank)


def expected(world, layer: int):
    x, ids, weights, experts, _ = world
    real = np.where(ids >= 0, weights, 0)
    arrays = map(jnp.asarray, (x, np.maximum(ids, 0), real))
    return dense_experts(jnp.asarray(experts), layer, *arrays)


def ragged_by_gathering(operand, output, starts, sizes, starts_there, sizes_here, *, axis_name):
    """`lax.ragged_all_to_all` by its documentation, from an all-gather: XLA:CPU has none."""
    gather = functools.partial(lax.all_gather, axis_name=axis_name)
    operands, starts, sizes, targets = map(gather, (operand, starts, sizes, starts_there))
    me = lax.axis_index(axis_name)
    for source in range(operands.shape[0]):
        row = jnp.arange(output.shape[0])
        offset = row - targets[source, me]
        comes = (offset >= 0) & (offset < sizes[source, me])
        taken = operands[source][jnp.clip(starts[source, me] + offset, 0, len(operand) - 1)]
        output = jnp.where(comes[:, None], taken, output)
    return output


@pytest.mark.parametrize("layer", [0, L - 1])
@pytest.mark.parametrize("name", exchanges.EXCHANGES)
def test_gives_what_all_experts_in_one_process_give(name, layer, world, monkeypatch):
    monkeypatch.setattr(lax, "ragged_all_to_all", ragged_by_gathering)
    # Sums of K products of F and D float32 numbers in another order.
    np.testing.assert_allclose(
        on_every_rank(name, world, layer), expected(world, layer), rtol=1e-4, atol=1e-4
    )


def test_the_ragged_exchange_lowers_for_gpus():
    mesh = jax.sharding.AbstractMesh((R,), (AXIS,))

    def run(x, ids, weights, bank):
        return exchange("ragged_all_to_all")(x, ids, weights, Experts(bank, 0, R, tile_rows=4))

    spread = jax.shard_map(run, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False)
    of = lambda shape, dtype: jax.ShapeDtypeStruct(
        (R * shape[0], *shape[1:]), dtype, sharding=jax.sharding.NamedSharding(mesh, P(AXIS))
    )
    arguments = (
        of((T, D), jnp.float32),
        of((T, K), jnp.int32),
        of((T, K), jnp.float32),
        of((S, L, 3, F, D), jnp.float32),
    )
    text = jax.jit(spread).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("ragged_all_to_all") >= 2 and "all_to_all" in text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_packed_comes_out_bit_for_bit(dtype):
    x = jnp.arange(12.0).reshape(2, 6).astype(dtype)
    ids = jnp.array([[-1, 7, 2**31 - 1], [0, -(2**31), 40_000]], jnp.int32)
    weights = jnp.array([[1e-30, -0.0, 3.14159], [jnp.inf, 1e30, 0.1]], jnp.float32)
    for found, given in zip(
        jax.jit(lambda *a: unpack(pack(*a), 6, 3))(x, ids, weights), (x, ids, weights), strict=True
    ):
        assert found.dtype == given.dtype
        np.testing.assert_array_equal(
            np.asarray(found).view(np.uint8), np.asarray(given).view(np.uint8)
        )


def test_an_unknown_exchange_is_refused_by_name():
    with pytest.raises(ValueError, match="'gather' is not one of"):
        exchange("gather")
