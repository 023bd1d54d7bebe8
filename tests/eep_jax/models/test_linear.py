"""Projections: on a GPU a row that is alone has company, and the same result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from eep_jax.models import linear as module
from eep_jax.models.linear import dot_of_rows, linear
from tests.support.lowering import like, lowered


@pytest.mark.parametrize("shape", [(1, 16), (16,), (1, 1, 16), (2, 16), (2, 1, 16)])
@pytest.mark.parametrize("preferred", [None, jnp.float32])
def test_a_row_more_changes_no_result(monkeypatch, shape, preferred):
    layer = linear(
        16, 8, param_dtype=jnp.bfloat16, preferred_element_type=preferred, rngs=nnx.Rngs(0)
    )
    x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    wanted = layer(x)
    monkeypatch.setattr(module, "platform", lambda: "gpu")
    found = layer(x)
    assert (
        (found.shape, found.dtype)
        == (wanted.shape, wanted.dtype)
        == ((*shape[:-1], 8), wanted.dtype)
    )
    np.testing.assert_allclose(found.astype(np.float32), wanted.astype(np.float32), rtol=2**-7)


@pytest.mark.parametrize(("rows", "multiplied"), [(1, 2), (2, 2), (64, 64)])
def test_no_product_of_one_row_is_lowered_for_a_gpu(rows, multiplied):
    dims = (((1,), (0,)), ((), ()))
    run = lambda x, weights: dot_of_rows(x, weights, dims)
    text = lowered(run, like((rows, 128), jnp.bfloat16), like((128, 64), jnp.bfloat16))
    assert f"(tensor<{multiplied}x128xbf16>, tensor<128x64xbf16>)" in text
