"""Promise: every family's logits are those of transformers, from its own checkpoint files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from eep_jax.config import EngineConfig
from eep_jax.models.weights import build_dense_model, dense_names, expert_name
from tests.eep_jax.models import make_parity
from tests.support.engines import compiling_nothing
from tests.support.parity import NAMES, ROOT, reference
from tests.support.parity_cluster import ParityCluster
from tests.support.wide_parity import wide_weights

RANKS = 4
# Of these a rank compiles steps of every size, for itself alone as well, as in production.
ALONE = ("qwen3_moe", "deepseek_v3")
# The lite variant differs in projections alone, which the test of whole sequences has seen.
TOGETHER = tuple(name for name in NAMES if name not in (*ALONE, "deepseek_v2_lite"))


@pytest.fixture
def quick_compilation(monkeypatch):
    """XLA without its slow passes, and steps of one size: families differ in neither."""
    monkeypatch.setattr(EngineConfig, "step_sizes", property(lambda self: (self.tokens_max,)))
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def dense_model(checkpoint):
    """All of it in one process, no cache: the plain formula."""
    found = checkpoint.read_experts(list(range(checkpoint.model.experts)))
    experts = {expert_name(e): weights for e, weights in found.items()}
    return build_dense_model(checkpoint.model, checkpoint.read_dense(), experts)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", NAMES)
def test_a_whole_sequence_has_the_logits_of_transformers(name):
    wanted = reference(name)
    tokens = np.concatenate([wanted.prompt, wanted.tokens])
    graph, state = nnx.split(dense_model(wanted.checkpoint))
    logits = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens)[0])
    wanted.assert_same(np.asarray(logits(state, jnp.asarray(tokens[None]))[0]), slice(None))


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_has_just_the_weights_of_the_decoder(name):
    checkpoint = reference(name).checkpoint
    dense = checkpoint.read_dense()
    shapes = {key: leaf.shape for key, leaf in dense_names(checkpoint.model).items()}
    assert {key: dense[key].shape for key in dense} == shapes
    total = sum(weights.size for weights in dense.values())
    assert checkpoint.model.dense_parameters == total


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", NAMES)
def test_the_wide_checkpoints_of_the_gpu_tests_have_the_same_logits(name):
    wanted = reference(name)
    model, dense, experts = wide_weights(wanted)
    named = {expert_name(e): weights for e, weights in enumerate(experts)}
    graph, state = nnx.split(build_dense_model(model, dense, named))
    tokens = jnp.asarray(np.concatenate([wanted.prompt, wanted.tokens])[None])
    logits = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens)[0])
    wanted.assert_same(np.asarray(logits(state, tokens)[0]), slice(None))


@pytest.mark.parametrize("name", ALONE)
def test_ranks_that_read_the_directory_serve_the_logits_of_transformers(name):
    """One rank; four; and four of which one dies in mid-generation and comes back."""
    wanted = reference(name)
    alone = ParityCluster(wanted, 1, wanted.checkpoint.model.experts).begin()
    alone.submit()
    alone.assert_parity(alone.serve())

    cluster = ParityCluster(wanted, RANKS, slots_per_rank=3).begin()
    assert sorted(cluster.experts.read) == list(range(8)), "each is read by the rank that has it"
    with compiling_nothing(cluster.engines):
        cluster.submit()
        unharmed = cluster.serve()
        cluster.assert_parity(unharmed)
        cluster.begin()
        cluster.lose_one_and_take_it_back(2, cluster.submit())
        assert cluster.serve() == unharmed
        cluster.assert_parity(unharmed)
    assert unharmed["whole0"] == alone.book.tokens["whole0"]


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", TOGETHER)
def test_one_three_and_four_ranks_have_the_logits_of_transformers(name):
    """They run one compiled step: who is there is data. At last one rank dies and comes back."""
    wanted = reference(name)
    experts = wanted.checkpoint.model.experts
    cluster = ParityCluster(wanted, RANKS, slots_per_rank=experts)
    few = experts // RANKS
    with compiling_nothing(cluster.engines):
        for shares in (
            {0: experts},
            {0: experts - 3, 1: 2, 3: 1},
            {0: few, 1: few, 2: few, 3: experts - 3 * few},
        ):
            members = tuple(shares)
            cluster.begin_with(shares).submit(members)
            tokens = dict(cluster.serve(members))
            cluster.assert_parity(tokens, members)
        cluster.begin_with(shares)
        cluster.lose_one_and_take_it_back(2, cluster.submit())
        assert cluster.serve() == tokens
        cluster.assert_parity(tokens)


@pytest.mark.torch
def test_transformers_writes_the_same_checkpoints_anew(tmp_path):
    """With torch at hand, what is kept here is made again and compared; else that is asserted."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError):
            make_parity.make_one(NAMES[0], tmp_path / NAMES[0])
        pytest.skip("torch or transformers cannot be imported")
    assert make_parity.facts() == json.loads((ROOT / make_parity.FACTS).read_text())
    for name in NAMES:
        make_parity.make_one(name, tmp_path / name)
        kept, made = reference(name), reference(name, tmp_path)
        assert made.checkpoint.model == kept.checkpoint.model
        np.testing.assert_array_equal(made.tokens, kept.tokens)
        kept.assert_same(made.logits, slice(None))
