"""Promises of the expert layer in one process: it is the sum it says, and it can be trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from eep_jax.library.config import ROUTERS
from eep_jax.library.elastic_moe import (
    ElasticMoE,
    expert_arrays,
    expert_layers,
    sigmoid_topk,
    without_experts,
)
from eep_jax.models.weights import expert_name
from tests.eep_jax.library.factories import LAYERS, TwoLayers, a_model, a_moe, some_rows

# Sums of 16 and 12 float32 products in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def by_hand(moe: ElasticMoE, x: np.ndarray, router: str, norm: bool) -> np.ndarray:
    """A loop over tokens and choices in float64."""
    x, kernel = np.asarray(x, np.float64), np.asarray(moe.router.kernel[...], np.float64)
    experts, y = np.asarray(moe.experts[...], np.float64), np.zeros(x.shape)
    for t, row in enumerate(x):
        logits = row @ kernel
        exp = np.exp(logits - logits.max())
        scores = exp / exp.sum() if router == "softmax_topk" else 1 / (1 + np.exp(-logits))
        best = np.argsort(-scores, kind="stable")[: moe.config.experts_per_token]
        weights = scores[best] / (scores[best].sum() if norm else 1)
        for weight, expert in zip(weights, best, strict=True):
            gate, up, down = experts[expert]
            hidden = gate @ row
            y[t] += weight * ((hidden / (1 + np.exp(-hidden)) * (up @ row)) @ down)
    return y


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("router", ROUTERS)
def test_the_layer_is_the_loop_over_its_choices(router, norm):
    moe = ElasticMoE(a_moe(router=router, norm_topk_prob=norm), 0, rngs=nnx.Rngs(3))
    x = some_rows(1)
    y, place = moe(x)
    assert place is None and y.dtype == x.dtype
    np.testing.assert_allclose(y, by_hand(moe, x, router, norm), **CLOSE)


def test_rows_may_have_any_leading_axes():
    moe, x = a_model().experts[0], some_rows(2, (3, 4))
    flat, _ = moe(x.reshape(12, -1))
    np.testing.assert_allclose(moe(x)[0], flat.reshape(x.shape), **CLOSE)
    np.testing.assert_allclose(moe(x[0, 0])[0], flat[0], **CLOSE)


def test_sigmoid_scores_each_expert_alone():
    scores = jnp.array([0.8, 0.2, 0.4, 0.1])
    logits = jnp.log(scores / (1 - scores))
    ids, weights = sigmoid_topk(logits, 2, norm_topk_prob=False)
    assert ids.tolist() == [0, 2] and ids.dtype == jnp.int32
    np.testing.assert_allclose(weights, [0.8, 0.4], rtol=1e-6)
    ids, weights = sigmoid_topk(logits, 2, norm_topk_prob=True)
    np.testing.assert_allclose(weights, [2 / 3, 1 / 3], rtol=1e-6)
    raised = sigmoid_topk(logits.at[1].set(9.0), 4, norm_topk_prob=False)
    assert raised[0].tolist() == [1, 0, 2, 3], "another expert's logit changes no score"
    np.testing.assert_allclose(raised[1][1:], [0.8, 0.4, 0.1], rtol=1e-6)


def test_sigmoid_ties_go_to_the_lower_id_and_scores_of_zero_stay_finite():
    ids, weights = sigmoid_topk(jnp.full((2, 4), -1e4), 2, norm_topk_prob=True)
    assert ids.tolist() == [[0, 1], [0, 1]] and np.isfinite(weights).all()


@pytest.mark.parametrize("router", ROUTERS)
def test_gradients_are_those_of_finite_differences(router):
    moe = ElasticMoE(a_moe(router=router), 0, rngs=nnx.Rngs(4))
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
    with pytest.raises(ValueError, match=r"expert layer 0 .* pass the place"):
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
    with pytest.raises(ValueError, match=r"different .E, 3, F, D, K"):
        expert_layers(of((a_moe(), 0), (a_moe(expert_hidden=8), 1)))
    assert [m.layer for m in expert_layers(of((a_moe(), 1), (a_moe(), 0)))] == [0, 1]


def test_wrong_arguments_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="layer=-1"):
        ElasticMoE(a_moe(), -1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"\(4, 15\), expected 16 channels"):
        a_model().experts[0](jnp.zeros((4, 15)))
