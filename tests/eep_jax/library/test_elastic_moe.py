"""Promises of the expert layer in one process: it is the sum it says, and it can be trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from eep_jax.library.config import MoEConfig
from eep_jax.library.elastic_moe import (
    ElasticMoE,
    expert_arrays,
    expert_layers,
    without_experts,
)
from eep_jax.models.router import choose
from eep_jax.models.weights import expert_name
from tests.eep_jax.library.factories import (
    KINDS,
    LAYERS,
    TwoLayers,
    a_model,
    a_moe,
    filled,
    some_rows,
)

# Sums of 16 and 12 float32 products in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def by_hand(moe: ElasticMoE, x: np.ndarray) -> np.ndarray:
    """A loop over tokens and choices in float64."""
    x, y = np.asarray(x, np.float64), np.zeros(x.shape)
    for t, row in enumerate(x):
        for expert, weight in choices_by_hand(moe, row):
            y[t] += weight * expert_by_hand(moe, expert, row)
    return y


def choices_by_hand(moe: ElasticMoE, row: np.ndarray) -> list[tuple[int, float]]:
    config, count = moe.config, moe.config.experts_per_token
    logits = row @ np.asarray(moe.router.kernel[...], np.float64)
    if config.router_bias:
        logits = logits + np.asarray(moe.router.bias[...], np.float64)
    exp = np.exp(logits - logits.max())
    softmax, sigmoid = exp / exp.sum(), 1 / (1 + np.exp(-logits))
    scores = {"softmax_topk": softmax, "sigmoid_topk": sigmoid, "softmax_of_topk": exp}
    scores = scores[config.router]
    wanted = scores + np.asarray(moe.correction[...]) if config.router_correction else scores
    members = wanted.reshape(config.router_groups, -1)
    worth = np.sort(members, axis=1)[:, -2:].sum(axis=1)  # "top2"
    kept = np.argsort(-worth)[: config.router_groups_kept]
    outside = [g for g in range(config.router_groups) if g not in kept]
    members[outside] = -np.inf
    best = np.argsort(-members.reshape(-1), kind="stable")[:count]
    normed = config.norm_topk_prob or config.router == "softmax_of_topk"
    weights = scores[best] / (scores[best].sum() if normed else 1) * config.router_scaling
    return list(zip(best.tolist(), weights.tolist(), strict=True))


def expert_by_hand(moe: ElasticMoE, expert: int, row: np.ndarray) -> np.ndarray:
    width, size = moe.config.expert_hidden, moe.config.hidden
    whole = np.asarray(moe.experts[...], np.float64)[expert]
    (gate, up, down), rest = whole[:, :width], whole[:, width:].reshape(3, -1)
    gate, up = gate @ row, up @ row
    if moe.config.expert_biases:
        gate, up = gate + rest[0, :width], up + rest[1, :width]
    if moe.config.activation == "swiglu":
        return (gate / (1 + np.exp(-gate)) * up) @ down
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    return (gate / (1 + np.exp(-1.702 * gate)) * (up + 1)) @ down + rest[2, :size]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_is_the_loop_over_its_choices(kind, norm):
    config = a_moe(**KINDS[kind], norm_topk_prob=norm)
    moe = filled(ElasticMoE(config, 0, rngs=nnx.Rngs(3)))
    x = some_rows(1)
    y, routing = moe(x)
    assert routing is None and y.dtype == x.dtype
    np.testing.assert_allclose(y, by_hand(moe, x), **CLOSE)


def test_rows_may_have_any_leading_axes():
    moe, x = a_model().experts[0], some_rows(2, (3, 4))
    flat, _ = moe(x.reshape(12, -1))
    np.testing.assert_allclose(moe(x)[0], flat.reshape(x.shape), **CLOSE)
    np.testing.assert_allclose(moe(x[0, 0])[0], flat[0], **CLOSE)


def sigmoid(logits, count: int, norm_topk_prob: bool):
    sizes = {"hidden": 1, "expert_hidden": 1, "experts": logits.shape[-1]}
    sizes |= {"experts_per_token": count, "norm_topk_prob": norm_topk_prob}
    return choose(logits, MoEConfig(**sizes, router="sigmoid_topk").model())


def test_sigmoid_scores_each_expert_alone():
    scores = jnp.array([0.8, 0.2, 0.4, 0.1])
    logits = jnp.log(scores / (1 - scores))
    ids, weights = sigmoid(logits, 2, norm_topk_prob=False)
    assert ids.tolist() == [0, 2] and ids.dtype == jnp.int32
    np.testing.assert_allclose(weights, [0.8, 0.4], rtol=1e-6)
    ids, weights = sigmoid(logits, 2, norm_topk_prob=True)
    np.testing.assert_allclose(weights, [2 / 3, 1 / 3], rtol=1e-6)
    raised = sigmoid(logits.at[1].set(9.0), 4, norm_topk_prob=False)
    assert raised[0].tolist() == [1, 0, 2, 3], "another expert's logit changes no score"
    np.testing.assert_allclose(raised[1][1:], [0.8, 0.4, 0.1], rtol=1e-6)


def test_sigmoid_ties_go_to_the_lower_id_and_scores_of_zero_stay_finite():
    ids, weights = sigmoid(jnp.full((2, 4), -1e4), 2, norm_topk_prob=True)
    assert ids.tolist() == [[0, 1], [0, 1]] and np.isfinite(weights).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind):
    moe = filled(ElasticMoE(a_moe(**KINDS[kind]), 0, rngs=nnx.Rngs(4)))
    x = some_rows(5)

    def loss(moe):
        return jnp.sum(moe(x)[0] * jnp.arange(1.0, 17.0))

    gradients = nnx.grad(loss)(moe)
    rng = np.random.default_rng(0)
    for name, size in (("experts", 3e-3), ("router", 1e-3)):
        variable = moe.experts if name == "experts" else moe.router.kernel
        found = gradients["experts"] if name == "experts" else gradients["router"]["kernel"]
        assert np.isfinite(found[...]).all() and np.any(found[...])
        before = variable[...]
        along = jnp.asarray(rng.standard_normal(before.shape), jnp.float32)
        sides = []
        for sign in (1, -1):
            variable[...] = before + sign * size * along
            sides.append(float(loss(moe)))
        variable[...] = before
        numeric = (sides[0] - sides[1]) / (2 * size)
        # A central difference of a float32 sum of some 100: three digits, if no choice flips.
        np.testing.assert_allclose(float(jnp.vdot(found[...], along)), numeric, rtol=2e-2)


def test_training_lowers_the_loss():
    model, x = TwoLayers(a_moe(), nnx.Rngs(1)), some_rows(6, (32,))
    target = jnp.roll(x, 1, axis=-1) * 0.5
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def train(model, optimizer):
        loss, gradients = nnx.value_and_grad(lambda m: jnp.mean((m(x)[0] - target) ** 2))(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(train(model, optimizer)) for _ in range(30)]
    assert np.isfinite(losses).all() and losses[-1] < 0.7 * losses[0], losses


def test_experts_are_stacked_over_layers_in_order():
    model = a_model()
    arrays = expert_arrays(model)
    assert list(arrays) == [expert_name(e) for e in range(8)]
    for e, array in enumerate(arrays.values()):
        assert array.shape == (LAYERS, 3, 12, 16)
        for layer in range(LAYERS):
            np.testing.assert_array_equal(array[layer], model.experts[layer].experts[...][e])


def test_a_model_without_experts_keeps_the_rest_and_says_what_it_lacks():
    model = a_model()
    rest = without_experts(model)
    shapes = {leaf.shape for leaf in jax.tree.leaves(nnx.state(rest))}
    assert shapes == {(16,), (16, 8)}, "norms and routers"
    assert hasattr(model.experts[0], "experts"), "the model itself is left as it was"
    with pytest.raises(ValueError, match=r"expert layer 0 .* pass the routing"):
        rest(some_rows())
    abstract = without_experts(nnx.eval_shape(lambda: TwoLayers(a_moe(), nnx.Rngs(0))))
    assert len(jax.tree.leaves(nnx.state(abstract))) == 4


def test_layers_must_be_numbered_and_alike():
    def of(*layers):
        return nnx.List([ElasticMoE(moe, layer, rngs=nnx.Rngs(0)) for moe, layer in layers])

    with pytest.raises(ValueError, match=r"numbered \[0, 0\], expected 0, 1"):
        expert_layers(of((a_moe(), 0), (a_moe(), 0)))
    with pytest.raises(ValueError, match=r"numbered \[1\]"):
        expert_layers(of((a_moe(), 1)))
    with pytest.raises(ValueError, match=r"numbered \[\]"):
        expert_layers(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="different activations"):
        expert_layers(of((a_moe(), 0), (a_moe(activation="clamped_swiglu"), 1)))
    with pytest.raises(ValueError, match=r"different .E, 3, F, D, K"):
        expert_layers(of((a_moe(), 0), (a_moe(expert_hidden=8), 1)))
    assert [m.layer for m in expert_layers(of((a_moe(), 1), (a_moe(), 0)))] == [0, 1]


def test_wrong_arguments_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="layer=-1"):
        ElasticMoE(a_moe(), -1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"\(4, 15\), expected 16 channels"):
        a_model().experts[0](jnp.zeros((4, 15)))
