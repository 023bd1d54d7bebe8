"""Products of rows and weights: several matrices in one launch, any sizes, lowered for an H100.

That bits do not depend on the number of rows is compared on a GPU, in tests/gpu/test_product.py.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.device import SM_COUNT
from pallas_kernels.product.api import product, products
from pallas_kernels.product.mosaic_gpu import config_for, products_mosaic
from tests.support.lowering import kernels, like, lowered


def test_elsewhere_than_on_a_gpu_xla_multiplies():
    dice = np.random.default_rng(0)
    x, a, b = (
        jnp.asarray(dice.standard_normal(s), jnp.float32) for s in ((2, 3, 5), (5, 4), (5, 2))
    )
    for found, weights in zip(products(x, (a, b)), (a, b), strict=True):
        np.testing.assert_allclose(found, np.asarray(x) @ np.asarray(weights), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(product(x, a.T, transposed=True), product(x, a))
    narrow = x.astype(jnp.bfloat16), a.astype(jnp.bfloat16)
    assert product(*narrow).dtype == jnp.bfloat16
    assert product(*narrow, out_dtype=jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("rows", [1, 8, 60, 64, 65, 320, 4160])
def test_products_lower_for_any_number_of_rows(rows, out_dtype):
    run = lambda x, a, b: products(x, (a, b), out_dtype=out_dtype)
    sizes = ((rows, 2048), (2048, 4096), (2048, 512))
    text = lowered(run, *(like(shape, jnp.bfloat16) for shape in sizes))
    assert len(kernels(text)) == 1


def test_widths_that_the_matrix_unit_has_not_are_padded():
    run = lambda x, w: product(x, w, transposed=True)
    text = lowered(run, like((3, 100), jnp.bfloat16), like((1, 100), jnp.bfloat16))
    assert len(kernels(text)) == 1 and "3x1xbf16" in text
    with pytest.raises(NotImplementedError, match="must be multiples of 64 and 64"):
        lowered(
            lambda x, w: products_mosaic(x, [w]),
            *(like(s, jnp.bfloat16) for s in ((8, 100), (100, 64))),
        )


def test_tiles_are_wide_only_where_all_multiprocessors_get_one():
    assert config_for(64, 4096, 4096).columns == 64
    assert config_for(128, 4096, 4096).columns == 128
    assert config_for(128 * SM_COUNT // 16, 4096, 4096).columns == 256
    assert config_for(4160, 4096, 4096, out_bytes=4).columns == 128
    assert config_for(4160, 64, 4160).columns == 64
