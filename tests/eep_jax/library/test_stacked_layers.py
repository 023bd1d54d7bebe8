"""Promises of layers stacked by nnx.vmap and nnx.scan: the bank has each layer, at its number."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from eep_jax.library.elastic_moe import (
    ElasticMoE,
    LayerNumber,
    expert_arrays,
    expert_layers,
    without_experts,
)
from eep_jax.placement.planner import plan_repair
from tests.eep_jax.library.factories import StepperCluster, a_moe, some_rows

# Sums of 16 and 12 float32 products in another order, through a few layers.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SCAN = {"in_axes": (0, nnx.Carry), "out_axes": nnx.Carry}


class Block(nnx.Module):
    """`x + moe(norm(x))`."""

    def __init__(self, layer, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(a_moe().hidden, rngs=rngs)
        self.moe = ElasticMoE(a_moe(), layer, rngs=rngs)

    def __call__(self, x, routing=None):
        y, routing = self.moe(self.norm(x), routing)
        return x + y, routing


def by_vmap(numbers, rngs: nnx.Rngs, make=Block):
    return nnx.split_rngs(splits=len(numbers))(nnx.vmap(make))(jnp.asarray(numbers), rngs)


def by_scan(numbers, rngs: nnx.Rngs):
    make = nnx.scan(
        lambda carry, layer, rngs: (carry, Block(layer, rngs)),
        in_axes=(nnx.Carry, 0, 0),
        out_axes=(nnx.Carry, 0),
    )
    return nnx.split_rngs(splits=len(numbers))(make)(0, jnp.asarray(numbers), rngs)[1]


def through(stack, x, routing):
    return nnx.scan(lambda block, carry: block(*carry), **SCAN)(stack, (x, routing))


class Pair(nnx.Module):
    """Two blocks, or any number stacked, in a group that is stacked itself."""

    def __init__(self, numbers, rngs: nnx.Rngs):
        self.blocks = nnx.split_rngs(splits=2)(nnx.vmap(Block))(numbers, rngs)

    def __call__(self, x, routing=None):
        return through(self.blocks, x, routing)


class Model(nnx.Module):
    """`stacks` are run one after the other; one that is a plain block is called."""

    def __init__(self, *stacks):
        self.stacks = nnx.List(stacks)

    def __call__(self, x, routing=None):
        for stack in self.stacks:
            run = functools.partial(through, stack) if stacked(stack) else stack
            x, routing = run(x, routing)
        return x, routing


def stacked(block) -> bool:
    return any(m.stack for _, m in nnx.iter_modules(block) if isinstance(m, ElasticMoE))


def nested(rngs: nnx.Rngs):
    return nnx.split_rngs(splits=2)(nnx.vmap(Pair))(jnp.arange(4).reshape(2, 2), rngs)


MODELS = {
    "vmap": lambda rngs: Model(by_vmap(range(3), rngs)),
    "scan": lambda rngs: Model(by_scan(range(3), rngs)),
    "numbered backwards": lambda rngs: Model(by_vmap([2, 1, 0], rngs)),
    "between plain layers": lambda rngs: Model(
        Block(0, rngs), by_vmap([1, 2], rngs), Block(3, rngs)
    ),
    "two that take turns": lambda rngs: Model(by_vmap([0, 2], rngs), by_scan([1, 3], rngs)),
    "nested": lambda rngs: Model(nested(rngs)),
}


@functools.cache
def a_stacked(name: str) -> Model:
    return MODELS[name](nnx.Rngs(5))


def plain_blocks(model: Model) -> dict[int, ElasticMoE]:
    """Each layer alone, by its number."""
    found = {}
    for module in expert_layers(model):
        if not module.stack:
            number = module.layer if isinstance(module.layer, int) else int(module.layer[...])
            found[number] = module
            continue
        for index in np.ndindex(module.stack):
            one = jax.tree.map(lambda leaf, index=index: leaf[index], module)
            found[int(one.layer[...])] = one
    return found


@pytest.mark.parametrize("name", MODELS)
def test_experts_of_a_stack_are_split_by_the_numbers_of_its_layers(name):
    model = a_stacked(name)
    arrays, layers = expert_arrays(model), plain_blocks(model)
    assert sorted(layers) == list(range(len(layers)))
    for expert, array in enumerate(arrays.values()):
        assert array.shape == (len(layers), 3, 12, 16)
        for number, layer in layers.items():
            np.testing.assert_array_equal(array[number], layer.experts[...][expert])
    rest = without_experts(model)
    assert {leaf.shape[-2:] for leaf in jax.tree.leaves(nnx.state(rest, nnx.Param))} & {
        (12, 16)
    } == set()
    assert [m.stack for m in expert_layers(rest)] == [m.stack for m in expert_layers(model)]


@pytest.mark.parametrize("name", MODELS)
def test_ranks_compute_a_stacked_model_as_one_process_does_whoever_is_in(name):
    model = a_stacked(name)
    cluster = StepperCluster(2, model=model, redundancy=2)
    cluster.change(cluster.ranks, cluster.whole)
    rows = {rank: some_rows(rank) for rank in cluster.ranks}
    found = cluster.call(rows)
    for rank, x in rows.items():
        np.testing.assert_allclose(found[rank], model(x)[0], **CLOSE)
    cluster.change([1], plan_repair(cluster.whole, [1]).placement)
    np.testing.assert_array_equal(cluster.call({1: rows[1]})[1], found[1])
    assert [s.compilations_since_start for s in cluster.steppers] == [0, 0]


def test_a_stacked_model_is_trained_as_its_layers_are():
    model, x = a_stacked("vmap"), some_rows(1)
    gradients = nnx.grad(lambda m: jnp.sum(m(x)[0] ** 2))(model)
    leaves = jax.tree.leaves(gradients)
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert not nnx.state(gradients, LayerNumber), "numbers have no gradient"


def test_an_abstract_stack_loses_its_experts_as_a_real_one_does():
    abstract = without_experts(nnx.eval_shape(lambda: MODELS["nested"](nnx.Rngs(5))))
    real = without_experts(a_stacked("nested"))
    shapes = lambda model: [leaf.shape for leaf in jax.tree.leaves(nnx.state(model))]
    assert shapes(abstract) == shapes(real)


def test_stacks_that_cannot_be_right_are_refused_with_the_way_out():
    rngs = nnx.Rngs(0)
    same = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: Block(0, rngs)))(rngs)
    for use in (expert_arrays, without_experts):
        with pytest.raises(ValueError, match=r"stack \[3\] .* layer=0; map the number, too: nnx"):
            use(same)
    axes = nnx.StateAxes({nnx.Param: 1, ...: 0})
    aside = nnx.split_rngs(splits=3)(nnx.vmap(Block, out_axes=axes))(jnp.arange(3), rngs)
    with pytest.raises(ValueError, match=r"is \(16, 3, 8\), expected \(16, 16, 8\).*out_axes=0"):
        expert_arrays(aside)
    with pytest.raises(ValueError, match=r"numbered \[1, 2, 3\]"):
        expert_arrays(by_vmap([1, 2, 3], rngs))
    with pytest.raises(ValueError, match=r"stack \[3\] of layers; call it inside nnx.scan"):
        by_vmap(range(3), rngs).moe(some_rows())
