"""Promises of the expert layer: wherever experts live, it computes what the dense one does."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eep_jax.membership.view import View
from eep_jax.models.moe_block import ExpertSpread, dense_experts, elastic_experts
from eep_jax.placement.placement import EMPTY, Placement, check
from eep_jax.placement.planner import initial_placement, plan_repair
from eep_jax.tables import build_tables
from pallas_kernels.exchange.call import ExchangeSpec
from tests.support.factories import a_view
from tests.support.loopback import in_threads, some_ranks, waits_that_know
from tests.support.models import a_model, some_weights

RANKS, SLOTS, TOKENS = 4, 8, 8
MODEL = a_model()
# Products of 32 and 16 float32 terms, summed in another order than by the dense layer.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def some_tokens(seed: int = 0):
    """For each rank (x, expert ids, weights), as a router may have chosen them."""
    random = np.random.default_rng(seed)
    shape = (RANKS, TOKENS, MODEL.experts_per_token)
    ids = np.argsort(random.random((RANKS, TOKENS, MODEL.experts)))[..., : shape[-1]]
    x = random.standard_normal((RANKS, TOKENS, MODEL.hidden))
    return x.astype(np.float32), ids.astype(np.int32), random.random(shape).astype(np.float32)


@functools.cache
def compiled(rank: int, mode: str):
    layout = some_ranks(RANKS, TOKENS, MODEL.experts_per_token, MODEL.hidden, mode).spec.layout
    spread = ExpertSpread(exchange=ExchangeSpec(layout, SLOTS), tile_rows=4)

    def two_layers(x, ids, weights, bank, heap, tables, call):
        y, dropped, call = elastic_experts(spread, 0, x, ids, weights, bank, heap, tables, call)
        z, _, call = elastic_experts(spread, 1, y, ids, weights, bank, heap, tables, call)
        return y, z, dropped, call.suspicion, call.vote

    return jax.jit(two_layers)


def elastic(tokens, placement: Placement, view: View, mode: str = "per_choice", absent=()):
    """Runs two expert layers on all members of the view; returns by rank what `two_layers` does."""
    cluster = some_ranks(RANKS, TOKENS, MODEL.experts_per_token, MODEL.hidden, mode)
    cluster.start_epoch()
    cluster.poison()
    experts = some_weights(MODEL)[1]

    def run(rank):
        held = np.array(placement.slots[rank])
        bank = np.where((held == EMPTY)[:, None, None, None, None], np.nan, experts[held])
        tables, mine = build_tables(view, placement, rank), [part[rank] for part in tokens]
        call = cluster.call(rank, tables.active, vote=rank)
        out = compiled(rank, mode)(*mine, bank, cluster.arrays[rank], tables, call)
        return jax.tree.map(np.asarray, out)

    members = [r for r in view.in_epoch if r not in absent]
    return in_threads({rank: functools.partial(run, rank) for rank in members})


def dense(tokens, rank: int, weights=None):
    """Both layers of one rank's tokens, in one process; `weights` replace those of the tokens."""
    x, ids = tokens[0][rank], tokens[1][rank]
    weights = tokens[2][rank] if weights is None else weights
    experts = jnp.asarray(some_weights(MODEL)[1])
    routes = jnp.asarray(ids), jnp.asarray(weights)
    y = dense_experts(experts, 0, jnp.asarray(x), *routes)
    return np.asarray(y), np.asarray(dense_experts(experts, 1, y, *routes))


def a_random_placement(seed: int) -> Placement:
    """Every expert somewhere, at random slots, with up to four replicas."""
    random = np.random.default_rng(seed)
    rows = np.full((RANKS, SLOTS), EMPTY)
    for expert in range(MODEL.experts):
        for rank in random.permutation(RANKS)[: random.integers(1, RANKS + 1)]:
            rows[rank, random.choice(np.flatnonzero(rows[rank] == EMPTY))] = expert
    return check(Placement(MODEL.experts, tuple(tuple(row) for row in rows.tolist())))


WHOLE = initial_placement(MODEL.experts, RANKS, SLOTS, redundancy=2)


@pytest.mark.parametrize("mode", ["per_choice", "per_rank"])
@pytest.mark.parametrize("seed", range(3))
def test_spread_experts_compute_what_the_dense_layer_computes(mode, seed):
    tokens = some_tokens(seed)
    found = elastic(tokens, a_random_placement(seed), a_view(), mode)
    for rank in range(RANKS):
        y, z, dropped, suspicion, vote = found[rank]
        for layer, wanted in zip((y, z), dense(tokens, rank), strict=True):
            np.testing.assert_allclose(layer, wanted, **CLOSE)
        assert not dropped.any() and not suspicion.any() and vote == RANKS - 1


@pytest.mark.parametrize("seed", range(4))
def test_no_placement_changes_a_bit_of_the_result(seed):
    tokens = some_tokens(5)
    wanted = elastic(tokens, WHOLE, a_view())
    found = elastic(tokens, a_random_placement(seed + 10), a_view())
    for rank in range(RANKS):
        np.testing.assert_array_equal(found[rank][1], wanted[rank][1])


def test_no_membership_changes_a_bit_of_a_survivors_result():
    tokens = some_tokens(6)
    wanted = elastic(tokens, WHOLE, a_view())
    for size in (1, 2, 3):
        for members in itertools.combinations(range(RANKS), size):
            words = ["active" if r in members else "absent" for r in range(RANKS)]
            repaired = plan_repair(WHOLE, members).placement
            found = elastic(tokens, repaired, a_view(" ".join(words), epoch=2))
            assert sorted(found) == list(members)
            for rank in members:
                np.testing.assert_array_equal(found[rank][1], wanted[rank][1])


@pytest.mark.parametrize("mode", ["per_choice", "per_rank"])
def test_an_expert_without_a_replica_adds_nothing_and_is_counted(mode):
    tokens, lost = some_tokens(7), (2, 5)
    gone = [(r, s) for r in range(RANKS) for s in range(SLOTS) if WHOLE.slots[r][s] in lost]
    found = elastic(tokens, WHOLE.without(gone), a_view(), mode)
    for rank in range(RANKS):
        is_lost = np.isin(tokens[1][rank], lost)
        left = np.where(is_lost, 0, tokens[2][rank])
        np.testing.assert_allclose(found[rank][1], dense(tokens, rank, left)[1], **CLOSE)
        np.testing.assert_array_equal(found[rank][2], is_lost.sum(axis=1))


def test_a_member_that_never_comes_takes_only_its_own_experts_away():
    tokens, view = some_tokens(8), a_view()
    with waits_that_know({3}) as log:
        found = elastic(tokens, WHOLE, view, absent={3})
    for rank in (0, 1, 2):
        places = build_tables(view, WHOLE, rank)
        turn = np.arange(TOKENS)[:, None] % places.replicas[tokens[1][rank]]
        owner = places.expert_slots[tokens[1][rank], turn] // SLOTS
        heard = np.where(owner == 3, 0, tokens[2][rank])
        np.testing.assert_allclose(found[rank][0], dense(tokens, rank, heard)[0], **CLOSE)
        assert np.flatnonzero(found[rank][3]).tolist() == [3]
        assert sum(3 in asked for who, asked, _ in log if who == rank) == 1
