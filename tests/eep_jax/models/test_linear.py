"""Projections are those of nnx; on a GPU their products are the kernel's, for any rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from eep_jax.models.linear import dot_of_rows, linear, project_together
from tests.support.lowering import kernels, like, lowered, without_kernels


@pytest.mark.parametrize("shape", [(1, 16), (16,), (1, 1, 16), (2, 1, 16)])
@pytest.mark.parametrize("preferred", [None, jnp.float32])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_projection_is_that_of_nnx(shape, preferred, dtype):
    options = {"param_dtype": dtype, "preferred_element_type": preferred}
    ours, theirs = (make(16, 8, rngs=nnx.Rngs(0), **options) for make in (linear, nnx.Linear))
    x = jax.random.normal(jax.random.key(0), shape, dtype)
    found, wanted = ours(x), theirs(x)
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("use_bias", [False, True])
def test_projections_together_are_those_one_by_one(use_bias):
    layers = [linear(16, width, use_bias=use_bias, rngs=nnx.Rngs(width)) for width in (8, 4, 4)]
    if use_bias:
        for layer in layers:
            layer.bias[...] = jax.random.normal(jax.random.key(1), layer.bias.shape)
    x = jax.random.normal(jax.random.key(0), (3, 16))
    for found, layer in zip(project_together(x, *layers), layers, strict=True):
        np.testing.assert_array_equal(found, layer(x))


@pytest.mark.parametrize("rows", [1, 2, 64])
def test_xla_multiplies_nothing_on_a_gpu(rows):
    dims = (((1,), (0,)), ((), ()))
    run = lambda x, weights: dot_of_rows(x, weights, dims)
    text = lowered(run, like((rows, 128), jnp.bfloat16), like((128, 64), jnp.bfloat16))
    assert len(kernels(text)) == 1 and "dot_general" not in without_kernels(text)
