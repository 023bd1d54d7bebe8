"""Attention of cuDNN to the caches is as XLA computes it in float32.

EEP_TEST_PLATFORM=gpu python -m pytest tests/gpu/test_attention.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.attention_cudnn import attend_cudnn, fits_cudnn
from eep_jax.models.attention import attend_xla

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

# Weights are rounded to bfloat16 before values are weighed: 2**-8 of the largest value, and as much
# again for the result.
CLOSE = 2.0**-7
TOKENS, SEQUENCES = 8, 16
SHAPES = pytest.mark.parametrize(
    ("channels", "query_heads", "kv_heads", "length"),
    [(8, 4, 2, 64), (64, 64, 8, 256), (128, 32, 4, 512), (128, 2, 2, 128), (80, 8, 2, 48)],
)
OPTIONS = pytest.mark.parametrize(
    "options",
    [{}, {"scale": 0.3}, {"window": 33}, {"sinks": True}, {"window": 9, "sinks": True}],
    ids=lambda options: " ".join(options) or "plain",
)


def draw(seed: int, *shape: int):
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


@SHAPES
@OPTIONS
def test_cudnn_attends_to_the_caches(channels, query_heads, kv_heads, length, options):
    q = draw(0, TOKENS, query_heads, channels)
    k, v = (draw(n, SEQUENCES, kv_heads, length, channels) for n in (1, 2))
    assert fits_cudnn(q, k)
    if "sinks" in options:
        options = options | {"sinks": draw(3, query_heads)}
    random = np.random.default_rng(0)
    positions = random.integers(0, length, TOKENS).astype(np.int32)
    positions[:2] = 0, length - 1
    slots = random.integers(0, SEQUENCES, TOKENS).astype(np.int32)
    looked_up = jax.jit(lambda *values: attend_cudnn(*values, **options))
    found = looked_up(q, k, v, positions, slots)

    wide = lambda array: array.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        wanted = attend_xla(wide(q), wide(k)[slots], wide(v)[slots], positions, **options)
    error = np.abs(wide(found) - wanted).max() / np.abs(wide(v)).max()
    print(f"off by {error:.5f} of the largest value")
    assert error <= CLOSE

    # What others left beyond a position, or what stands beside it, changes no bit.
    beyond = jnp.arange(length)[None, None, :, None] > positions.max()
    spoilt = [jnp.where(beyond, 1e4, cache).astype(cache.dtype) for cache in (k, v)]
    np.testing.assert_array_equal(looked_up(q, *spoilt, positions, slots), found)
    turned = [np.roll(array, 3, axis=0) for array in (np.asarray(q), positions, slots)]
    again = looked_up(turned[0], k, v, *turned[1:])
    np.testing.assert_array_equal(np.roll(np.asarray(again), -3, axis=0), found)

    # A cache that is given, as in decode steps, or looked up, as in prompts: the same bits.
    given = jax.jit(lambda *values: attend_cudnn(*values, **options))
    np.testing.assert_array_equal(given(q, k[slots], v[slots], positions), found)
