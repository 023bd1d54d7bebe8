"""Promise: a query's attention is right, and has the same bits alone as in any tile of queries.

What lies behind the last position is NaN, as an earlier sequence may have left it.

EEP_TEST_PLATFORM=gpu python -m pytest tests/gpu/test_paged_attention.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention.mosaic_gpu import attend_mosaic
from pallas_kernels.attention.plan import PAGE_TOKENS, plan_items
from pallas_kernels.attention.reference import attention_reference

pytestmark = pytest.mark.gpu

ERROR_MAX = 0.01  # of the largest value: shares are rounded to bfloat16 before they weigh values


class World:
    """Pages in random order, and queries that depend on their sequence and position alone."""

    def __init__(self, heads, kv_heads, channels, context, rows, window, sinks):
        """`rows`: (sequence, first position, count) of each piece of the step."""
        self.kv_heads, pages = kv_heads, context // PAGE_TOKENS
        keys = jax.random.split(jax.random.key(0), 4)
        sequences = 1 + max(sequence for sequence, _, _ in rows)
        dice = np.random.default_rng(0)
        self.table = dice.permutation(sequences * pages).reshape(sequences, pages).astype(np.int32)
        shape = (sequences * pages, kv_heads, PAGE_TOKENS, channels)
        k, v = (np.array(jax.random.normal(key, shape)) for key in keys[:2])
        for sequence in range(sequences):
            end = max((first + count for s, first, count in rows if s == sequence), default=0)
            for j in range(pages):
                behind = max(0, end - j * PAGE_TOKENS)
                k[self.table[sequence, j], :, behind:] = np.nan
                v[self.table[sequence, j], :, behind:] = np.nan
        self.k, self.v = jnp.asarray(k, jnp.bfloat16), jnp.asarray(v, jnp.bfloat16)
        join = lambda parts: np.concatenate(list(parts)).astype(np.int32)
        self.sequences = join(np.full(count, s) for s, _, count in rows)
        self.positions = join(np.arange(first, first + count) for _, first, count in rows)

        def query(sequence, position):
            key = jax.random.fold_in(jax.random.fold_in(keys[2], sequence), position)
            return jax.random.normal(key, (heads, channels), jnp.bfloat16)

        self.q = jax.vmap(query)(jnp.asarray(self.sequences), jnp.asarray(self.positions))
        self.sinks = jax.random.normal(keys[3], (heads,)) if sinks else None
        self.options = {"scale": channels**-0.5, "window": window}

    def attend(self, rows=slice(None)):
        sequences, positions = self.sequences[rows], self.positions[rows]
        found = plan_items(sequences, positions, self.q.shape[1] // self.kv_heads)
        items = np.zeros((1 << len(found).bit_length(), found.shape[1]), np.int32)
        items[: len(found)] = found
        flat = lambda pages: pages.reshape(-1, *pages.shape[2:])
        return attend_mosaic(
            self.q[rows],
            flat(self.k),
            flat(self.v),
            jnp.asarray(self.table * self.kv_heads),
            jnp.asarray(items),
            jnp.array([len(found)], jnp.int32),
            jnp.asarray(positions),
            kv_heads=self.kv_heads,
            sinks=self.sinks,
            **self.options,
        )

    def reference(self):
        run = jax.jit(functools.partial(attention_reference, **self.options))
        places = jnp.asarray(self.sequences), jnp.asarray(self.positions)
        return run(self.q, self.k, self.v, jnp.asarray(self.table), *places, sinks=self.sinks)


MIXED = [(0, 900, 1), (1, 0, 200), (2, 37, 91)]
LONG = [(0, 10_000, 1), (1, 4_090, 20), (2, 0, 4_200)]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "channels", "context", "rows", "window", "sinks"),
    [
        (32, 4, 128, 1024, MIXED, 0, False),
        (32, 8, 128, 1024, [(0, 5, 1), (1, 63, 1), (2, 64, 1), (3, 1000, 1)], 0, False),
        (28, 4, 128, 1024, MIXED, 0, False),
        (16, 16, 128, 1024, MIXED, 0, False),
        (64, 8, 64, 1024, MIXED, 128, True),
        (32, 4, 128, 10_240, LONG, 0, True),
        (32, 4, 128, 10_240, LONG[:2], 1000, False),
    ],
)
def test_results_are_right_and_bits_those_of_each_query_alone(
    heads, kv_heads, channels, context, rows, window, sinks
):
    world = World(heads, kv_heads, channels, context, rows, window, sinks)
    found = world.attend()
    values = np.asarray(found.astype(jnp.float32))
    wanted = np.asarray(world.reference().astype(jnp.float32))
    assert np.isfinite(values).all()
    assert np.abs(values - wanted).max() <= ERROR_MAX * np.abs(wanted).max()
    bits = lambda array: np.asarray(array).view(np.uint16)
    for row in range(0, len(values), max(1, len(values) // 6)):
        alone = world.attend(slice(row, row + 1))
        np.testing.assert_array_equal(bits(alone[0]), bits(found[row]), err_msg=f"row {row}")
