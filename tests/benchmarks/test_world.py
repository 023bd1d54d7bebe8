"""Promises of the step that benchmarks time: its experts, router and widths are the model's."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import configs
from benchmarks import world as worlds
from benchmarks.gpu_timing import compile_all
from benchmarks.wide.decode_sizes import with_few_experts, with_sizes
from benchmarks.world import World, differences, touched_slots, with_layers
from eep_jax.heap.arrays import device_array, heap_argument
from eep_jax.heap.loopback import LoopbackHeap
from eep_jax.model_config import RouterConfig
from eep_jax.models.weights import decoder_graph, dense_names
from launch.flags import load_config
from pallas_kernels.expert_gemm.mlp import SWIGLU
from tests.support.models import a_model, a_run

CONFIGS = sorted(
    path.stem for path in pathlib.Path(configs.__path__[0]).glob("*.py") if path.stem[0] != "_"
)
FAMILIES = {
    "qwen": {},
    "gpt-oss": {
        "activation": "clamped_swiglu",
        "activation_limit": 0.05,  # so small that it matters for random weights
        "expert_biases": True,
        "qkv_bias": True,
        "output_bias": True,
        "sinks": True,
        "windows": (8, 0),
        "qk_norm": "none",
        "router": RouterConfig(score="softmax_of_chosen", bias=True),
    },
}


def sized(name: str):
    """The configuration as each benchmark of a step changes it."""
    config = load_config(name)
    yield config
    yield with_layers(config, 4)
    few = with_sizes(config, ranks=2, batch=8, layers=3, context_tokens=64)
    yield few
    yield with_few_experts(few, 2, 1 << 30)


class TestExperts:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_are_those_of_the_model_for_every_configuration(self, name):
        model = load_config(name).model
        for config in sized(name):
            world = World(config)
            mlp, layout = world.spread(1).mlp, world.layout
            assert mlp.activation == model.activation
            assert (mlp.limit, mlp.slope) == (model.activation_limit, model.activation_slope)
            assert mlp.bias_width == (model.expert_hidden if model.expert_biases else 0)
            layers, matrices, rows, hidden = layout.expert_shape
            assert (matrices, rows, hidden) == model.expert_shape[1:]
            assert layers == config.model.moe_layers
            assert layout.padded_shape[2] >= rows and layout.window.hidden == model.hidden
            assert world.config.model.router == model.router
            assert world.config.model.norm_topk_prob == model.norm_topk_prob
            # What is below the rows of weights has room for the biases, or there is neither.
            weights, biases = jax.eval_shape(
                mlp.split,
                jax.ShapeDtypeStruct(
                    layout.padded_shape[1:] if mlp.bias_width else (3, rows, hidden), np.float32
                ),
            )
            assert weights.shape[1] == model.expert_hidden and bool(biases) == model.expert_biases

    @pytest.mark.parametrize("name", CONFIGS)
    def test_dense_weights_are_given_as_the_step_takes_them(self, name):
        world = World(with_layers(load_config(name), 2))
        model, dtype = world.config.model, jnp.dtype(world.config.engine.dtype)
        dtypes = decoder_graph(model, dtype)[1]
        dense = world.arguments(world.alone(0))[0]
        assert [leaf.dtype for leaf in dense] == list(dtypes.values())
        assert [leaf.shape for leaf in dense] == [dense_names(model)[n].shape for n in dtypes]

    def test_drawn_ones_have_biases_and_padding_of_zeros(self):
        model = a_model(**FAMILIES["gpt-oss"])
        world = World(dataclasses.replace(load_config("tiny_gpu"), model=model))
        drawn = np.asarray(world.draw_experts([5]), np.float32)[0]
        assert drawn.shape == world.layout.padded_shape == (2, 3, 64, 32)
        assert drawn[:, :, 16].all() and not drawn[:, :, 17:].any()


class TestReference:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_agrees_with_the_elastic_step_and_says_what_it_chose(self, family):
        world = World(a_run(model=a_model(**FAMILIES[family]), batch_rows=16))
        found, wanted = both(world)
        assert not differences(world, wanted, found.tokens, found.cache, 1e-4)
        assert np.array_equal(wanted.tokens, found.tokens)
        np.testing.assert_array_equal(np.sum(wanted.chosen, axis=0), found.chosen)
        touched = touched_slots(world.alone(0), wanted.chosen)
        assert touched == np.count_nonzero(wanted.chosen, axis=1).tolist()

    def test_without_the_activation_and_the_biases_it_does_not_agree(self, monkeypatch):
        world = World(a_run(model=a_model(**FAMILIES["gpt-oss"]), batch_rows=16))
        found, _ = both(world)
        plain = worlds.plain_experts
        forget = lambda spread, *rest: plain(dataclasses.replace(spread, mlp=SWIGLU), *rest)
        monkeypatch.setattr(worlds, "plain_experts", forget)
        _, wanted = both(world)
        assert differences(world, wanted, found.tokens, found.cache)


def both(world: World):
    """Results of the live step over a heap, and of the reference, on the same arrays."""
    layout = world.layout
    heap = LoopbackHeap(0, 1, layout.slab_bytes)
    bank = world.bank()
    for slot in range(layout.slots):
        heap.write(layout.slot_offset(slot), np.asarray(bank[slot]))
    tables = world.alone(0)
    like = world.arguments(tables)
    arrays = (world.dense(), device_array(heap, layout.bank), world.cache(7), heap_argument(heap))
    arguments = (*arrays, *like[4:])
    programs = {"live": world.live(arguments), "reference": world.reference(arguments)}
    executables = compile_all(programs)
    wanted = executables["reference"](*arguments)
    return executables["live"](*arguments), wanted
