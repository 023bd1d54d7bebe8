"""Promises of each kind of router: the choices and weights of its published formula, in float64."""

import dataclasses

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from eep_jax.config import ModelConfig
from eep_jax.model_config import RouterConfig
from eep_jax.models.router import choose
from tests.support.models import a_model

EXPERTS, CHOICES = 12, 3
CLOSE = {"rtol": 2e-6, "atol": 1e-7}  # float32 softmax over twelve, against float64


def a_router(norm: bool = True, **changes) -> ModelConfig:
    router = RouterConfig(**changes)
    sizes = {"experts": EXPERTS, "experts_per_token": CHOICES, "norm_topk_prob": norm}
    return a_model(**sizes, router=router)


def softmax(x):
    shifted = np.exp(x - x.max())
    return shifted / shifted.sum()


def best(values, count: int) -> list[int]:
    """The largest, ties to the lower index."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def qwen(logits, norm: bool):
    """Qwen2-MoE, Qwen3-MoE, OLMoE: softmax over all, the best K of it, divided by their sum."""
    shares = softmax(logits)
    ids = best(shares, CHOICES)
    weights = shares[ids]
    return ids, weights / weights.sum() if norm else weights


def mixtral(logits):
    """Mixtral, gpt-oss: the best K logits, softmax over these."""
    ids = best(logits, CHOICES)
    return ids, softmax(logits[ids])


def deepseek_v2(logits, groups: int, kept: int, scaling: float):
    """Softmax over all; of the groups with the best single experts, the best K; times scaling."""
    shares = softmax(logits)
    size = EXPERTS // groups
    chosen = best([shares[g * size : (g + 1) * size].max() for g in range(groups)], kept)
    masked = [s if e // size in chosen else 0.0 for e, s in enumerate(shares)]
    ids = best(masked, CHOICES)
    return ids, shares[ids] * scaling


def deepseek_v3(logits, correction, groups: int, kept: int, scaling: float, norm: bool):
    """Sigmoids; corrected ones choose groups (by their two best) and experts, plain ones weigh."""
    scores = 1 / (1 + np.exp(-logits))
    wanted, size = scores + correction, EXPERTS // groups
    worth = [np.sort(wanted[g * size : (g + 1) * size])[-2:].sum() for g in range(groups)]
    chosen = best(worth, kept)
    ids = best([w if e // size in chosen else -np.inf for e, w in enumerate(wanted)], CHOICES)
    weights = scores[ids]
    return ids, (weights / weights.sum() if norm else weights) * scaling


def rows(seed: int, count: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (count, EXPERTS))


def check(model: ModelConfig, formula, logits, correction=None) -> None:
    given_correction = None if correction is None else jnp.asarray(correction, jnp.float32)
    ids, weights = choose(jnp.asarray(logits, jnp.float32), model, given_correction)
    assert ids.dtype == jnp.int32 and weights.dtype == jnp.float32
    for row, (found_ids, found) in enumerate(
        zip(np.asarray(ids), np.asarray(weights), strict=True)
    ):
        wanted_ids, wanted = formula(logits[row])
        assert found_ids.tolist() == wanted_ids
        np.testing.assert_allclose(found, wanted, **CLOSE)


@pytest.mark.parametrize("norm", [True, False])
def test_softmax_of_all_is_renormalised_where_it_is_said(norm):
    check(a_router(norm), lambda row: qwen(row, norm), rows(1))


def test_softmax_of_the_chosen():
    check(a_router(score="softmax_of_chosen"), mixtral, rows(2))


@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (3, 1), (4, 2), (6, 5)])
def test_groups_by_their_best_expert(groups, kept):
    model = a_router(norm=False, groups=groups, groups_kept=kept, scaling=16.0)
    check(model, lambda row: deepseek_v2(row, groups, kept, 16.0), rows(3))


@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (3, 1), (4, 2), (6, 2)])
@pytest.mark.parametrize("norm", [True, False])
def test_corrected_sigmoids_and_groups_by_their_two_best(groups, kept, norm):
    # Large enough to send tokens elsewhere, and to make corrected scores negative.
    correction = np.random.default_rng(4).normal(-0.6, 0.4, EXPERTS)
    how = {"score": "sigmoid", "correction": True, "group_score": "top2", "scaling": 2.5}
    model = a_router(norm, groups=groups, groups_kept=kept, **how)
    formula = lambda row: deepseek_v3(row, correction, groups, kept, 2.5, norm)
    check(model, formula, rows(5), correction)


def test_a_correction_changes_who_is_chosen_but_not_how_much_it_weighs():
    model = a_router(norm=False, score="sigmoid", correction=True)
    logits = np.zeros((1, EXPERTS))
    ids, weights = choose(jnp.asarray(logits), model, jnp.zeros(EXPERTS).at[7].set(5.0))
    assert ids[0, 0] == 7 and weights[0].tolist() == [0.5] * CHOICES


KINDS = {
    "qwen": {},
    "mixtral": {"score": "softmax_of_chosen"},
    "deepseek_v2": {"groups": 4, "groups_kept": 2, "scaling": 3.0},
    "deepseek_v3": {"score": "sigmoid", "groups": 4, "groups_kept": 2, "group_score": "top2"},
}


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.given(seed=st.integers(0, 2**31), shift=st.sampled_from([0.0, 80.0, -80.0]))
@hypothesis.settings(max_examples=15)
def test_choices_are_distinct_finite_and_sum_to_the_scaling(kind, seed, shift):
    model = a_router(**KINDS[kind])
    logits = jnp.asarray(rows(seed, 8) + shift, jnp.float32)
    ids, weights = map(np.asarray, choose(logits, model))
    assert all(len(set(row)) == CHOICES and min(row) >= 0 for row in ids.tolist())
    assert np.isfinite(weights).all() and (weights >= 0).all()
    assert ids.max() < EXPERTS
    if shift >= 0 or model.router.score != "sigmoid":  # sigmoid(-80) is next to nothing
        np.testing.assert_allclose(weights.sum(-1), model.router.scaling, rtol=1e-5)
    if model.router.groups > 1:
        groups = {tuple(sorted(set((row // 3).tolist()))) for row in ids}
        assert all(len(found) <= model.router.groups_kept for found in groups)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"score": "luck"}, "score='luck' must be one of"),
        ({"groups": 4, "groups_kept": 5}, "groups_kept=5 must be between 1 and self.groups=4"),
        ({"groups": 5, "groups_kept": 2}, "experts=12 must be a multiple of self.router.groups=5"),
        ({"groups": 6, "groups_kept": 1}, "experts_per_token=3 must fit into"),
    ],
)
def test_a_router_that_cannot_be_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        a_router(**changes)


def test_the_router_of_a_model_is_part_of_its_value():
    model = a_router()
    assert dataclasses.replace(model, router=RouterConfig(scaling=2.0)) != model
