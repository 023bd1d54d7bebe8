"""Promise: a row's product has the same bits whatever rows, place and tiles it is computed with.

EEP_TEST_PLATFORM=gpu python -m pytest tests/gpu/test_product.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.product.mosaic_gpu import ProductConfig, products_mosaic

pytestmark = pytest.mark.gpu


def bits(array) -> np.ndarray:
    return np.asarray(array).view(np.uint8)


@pytest.mark.parametrize(
    ("depth", "sizes", "out_dtype", "transposed"),
    [
        (2048, (4096, 512, 512), jnp.bfloat16, False),
        (4096, (2048,), jnp.bfloat16, False),
        (2048, (128,), jnp.float32, False),
        (256, (4032,), jnp.float32, True),
    ],
)
def test_bits_do_not_depend_on_rows_place_or_tiles(depth, sizes, out_dtype, transposed):
    keys = jax.random.split(jax.random.key(0), 1 + len(sizes))
    x = jax.random.normal(keys[0], (2113, depth), jnp.bfloat16)
    shape = lambda size: (size, depth) if transposed else (depth, size)
    weights = [
        (jax.random.normal(key, shape(size), jnp.float32) * depth**-0.5).astype(jnp.bfloat16)
        for key, size in zip(keys[1:], sizes, strict=True)
    ]
    run = functools.partial(products_mosaic, out_dtype=out_dtype, transposed=transposed)
    whole = run(x, weights)
    for found, w in zip(whole, weights, strict=True):
        wanted = x.astype(jnp.float32) @ (w.T if transposed else w).astype(jnp.float32)
        error = jnp.max(jnp.abs(found.astype(jnp.float32) - wanted)) / jnp.max(jnp.abs(wanted))
        assert error < 0.01
    for rows in (1, 2, 7, 8, 63, 64, 65, 320, 1088):
        for part, found in zip(run(x[:rows], weights), whole, strict=True):
            np.testing.assert_array_equal(bits(part), bits(found[:rows]), err_msg=f"{rows} rows")
    for part, found in zip(run(x[100:164], weights), whole, strict=True):
        np.testing.assert_array_equal(bits(part), bits(found[100:164]), err_msg="another place")
    for config in (ProductConfig(1, 64, 4), ProductConfig(2, 64, 3)):
        for part, found in zip(run(x[:320], weights, config=config), whole, strict=True):
            np.testing.assert_array_equal(bits(part), bits(found[:320]), err_msg=str(config))
