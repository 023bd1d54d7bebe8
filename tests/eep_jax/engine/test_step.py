"""Promises of the step in the dtype of a GPU, with all experts in one process, computed on CPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eep_jax.config import RunConfig
from eep_jax.engine import step as step_module
from eep_jax.engine.scheduler import Scheduler
from eep_jax.engine.step import empty_batch, make_step
from eep_jax.engine.votes import IDLE
from eep_jax.model_config import LatentConfig, RopeConfig, RouterConfig
from eep_jax.models.expert_bank import slab_layout
from eep_jax.models.kv_cache import empty_cache
from eep_jax.models.moe_block import ExpertSpread, dense_experts
from eep_jax.tables import solo_tables
from pallas_kernels.exchange.call import Call, ExchangeSpec
from pallas_kernels.exchange.signals import first_round
from tests.support.engines import a_request
from tests.support.models import a_model, a_run, rounded_weights

PROMPT = (3, 1, 4, 1, 5, 9)


def experts_here(spread, layer, x, ids, weights, bank, heap, tables, call):
    """`elastic_experts` over a bank that holds every expert in the slot of its number."""
    share = jnp.where(ids >= 0, weights, 0)
    experts = lambda *tile: dense_experts(bank, layer, *tile)
    y = step_module.by_tile(experts, spread.tile_rows, x, jnp.maximum(ids, 0), share)
    return y.astype(jnp.float32), jnp.zeros(len(x), jnp.int32), call.next()


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("elastic_experts", "shared_elastic_experts"):
        monkeypatch.setattr(step_module, name, experts_here)


# What other families have beside the default's.
LATENT = {
    "latent": LatentConfig(
        kv_rank=16, rope_channels=8, plain_channels=12, value_channels=10, q_rank=24
    ),
    "qk_norm": "none",
    "rope": RopeConfig(interleaved=True),
    "router": RouterConfig(score="sigmoid", correction=True, groups=4, groups_kept=2),
    "shared_hidden": 24,
    "dense_layers": 1,
    "dense_hidden": 40,
}
SINKS = {
    "qk_norm": "full",
    "qkv_bias": True,
    "output_bias": True,
    "windows": (5, 0),
    "sinks": True,
    "router": RouterConfig(score="softmax_of_chosen", bias=True),
    "shared_hidden": 24,
    "shared_gate": True,
    "tied_embeddings": True,
}
SIZES = pytest.mark.parametrize("size", [0, -1], ids=["narrow", "wide"])
MODELS = pytest.mark.parametrize("options", [{}, LATENT, SINKS], ids=["plain", "latent", "sinks"])


def narrow(**options) -> RunConfig:
    config = a_run(model=a_model(**options))
    engine = dataclasses.replace(config.engine, dtype="bfloat16")
    return dataclasses.replace(config, platform="gpu", engine=engine)


def step_of(config: RunConfig):
    """The step and the names of its dense weights."""
    cluster = config.cluster
    layout = slab_layout(config.model, config.engine, 1, cluster.slots_per_rank).window
    tile, slots = config.engine.row_tile, cluster.slots_per_rank
    spread = ExpertSpread(exchange=ExchangeSpec(layout, slots), tile_rows=tile)
    return make_step(config, spread)


def arguments(config: RunConfig, batch):
    dense, experts = rounded_weights(config.model)
    dtype, (_, names) = jnp.dtype(config.engine.dtype), step_of(config)
    call = Call(
        rank=np.int32(0),
        active=np.ones(1, np.int32),
        epoch=np.uint32(1),
        round=np.uint32(first_round(1)),
        deadline_ms=np.uint32(0),
        vote=np.uint32(0),
        suspicion=np.zeros(1, np.int32),
    )
    weights = [jnp.asarray(dense[name], kept) for name, kept in names.items()]
    cache = empty_cache(config)
    tables = solo_tables(1, config.model.experts, config.cluster.slots_per_rank, 0)
    return [
        weights,
        jnp.asarray(experts, dtype),
        cache,
        jnp.zeros((1, 1), jnp.uint8),
        tables,
        batch,
        call,
    ]


def serve(config: RunConfig, prompt, count: int):
    """Returns the tokens that follow and the cache, `[P C]` by layer, keys then values."""
    scheduler = Scheduler(config)
    step = jax.jit(step_of(config)[0], compiler_options=step_module.COMPILER_OPTIONS)
    scheduler.add(a_request("it", prompt, max_tokens=count))
    values, tokens = arguments(config, None), []
    while (rows := scheduler.vote()) != IDLE:
        plan = scheduler.plan(rows)
        values[-2] = plan.batch
        result = step(*values)
        values[2] = result.cache
        sampled, dropped = np.asarray(result.tokens), np.asarray(result.dropped)
        for part in scheduler.commit(plan, sampled, dropped, np.asarray(result.finite)):
            tokens = list(part.tokens) if part.finish else tokens
    length, pages = len(prompt) + count - 1, plan.batch.table[0]
    rows = lambda leaf: np.asarray(leaf)[pages, 0].reshape(-1, leaf.shape[-1])[:length]
    cache = values[2]
    return tuple(tokens), [rows(leaf) for leaf in (*cache.keys, *cache.values)]


def test_the_cache_holds_what_float32_would_but_for_rounding():
    model = a_run().model
    tokens, found = serve(narrow(), PROMPT, 1)
    wanted_tokens, wanted = serve(a_run(), PROMPT, 1)
    assert len(tokens) == len(wanted_tokens) == 1
    for layer in range(model.layers):
        for part in (layer, model.layers + layer):
            assert found[part].dtype == jnp.bfloat16
            error = np.linalg.norm(np.float32(found[part]) - wanted[part])
            assert error < 0.02 * np.linalg.norm(wanted[part])


@MODELS
def test_rows_from_prefill_and_from_decode_have_the_same_bits(options):
    """Without COMPILER_OPTIONS they differ in the last bits."""
    config = narrow(**options)
    tokens, decoded = serve(config, PROMPT[:1], 12)
    _, prefilled = serve(config, PROMPT[:1] + tokens[:-1], 1)
    for one, other in zip(prefilled, decoded, strict=True):
        np.testing.assert_array_equal(one.view(np.uint16), other.view(np.uint16))


@MODELS
@SIZES
def test_a_step_gives_back_a_cache_of_the_dtype_it_took(size, options):
    """Else it could not be donated."""
    config = narrow(**options)
    values = arguments(config, empty_batch(config, config.engine.step_sizes[size]))
    result = jax.eval_shape(step_of(config)[0], *values)
    kept = lambda cache: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), cache)
    assert kept(result.cache) == kept(values[2])
    assert result.tokens.dtype == jnp.int32 and result.round.dtype == jnp.uint32


@MODELS
@SIZES
def test_matrix_products_take_bfloat16(size, options):
    config = narrow(**options)
    values = arguments(config, empty_batch(config, config.engine.step_sizes[size]))
    traced = jax.jit(step_of(config)[0]).trace(*values)
    products = [line for line in str(traced.jaxpr).splitlines() if "dot_general" in line]
    assert products
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(dots) >= 8 and all("xbf16>, tensor<" in line for line in dots), dots
