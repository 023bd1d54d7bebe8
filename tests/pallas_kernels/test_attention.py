"""Attention by work items: what the items cover, what is computed, and that it lowers for an H100.

Results and their bits are compared on a GPU, in tests/gpu/test_paged_attention.py.
"""

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from eep_jax.models.paged_attention import attend_pages
from pallas_kernels.attention.api import attend, fits
from pallas_kernels.attention.plan import (
    CHUNK_TOKENS,
    FIELDS,
    PAGE_TOKENS,
    chunks_of,
    items_max,
    plan_items,
    tile_queries,
)
from pallas_kernels.attention.reference import attention_reference
from tests.support.lowering import kernels, like, lowered

CONTEXT = 3 * CHUNK_TOKENS


@st.composite
def steps(draw):
    """Rows of a step as the scheduler lays them out: decode rows, then pieces of prompts."""
    batch = draw(st.integers(1, 6))
    decoding = draw(st.sets(st.integers(0, batch - 1)))
    position = st.integers(0, CONTEXT - 200)
    rows = [(b, draw(position)) if b in decoding else (0, -1) for b in range(batch)]
    for b in range(batch):
        if b not in decoding and draw(st.booleans()):
            first = draw(position)
            rows += [(b, first + i) for i in range(draw(st.integers(1, 150)))]
    rows += [(0, -1)] * draw(st.integers(0, 40))
    return np.array(rows, np.int32).T, batch


@given(steps(), st.sampled_from([1, 4, 7, 8, 16, 64]))
def test_every_token_has_one_item_for_each_chunk_that_it_sees_and_empty_rows_have_none(step, heads):
    (sequences, positions), batch = step
    items = plan_items(sequences, positions, heads)
    assert len(items) <= items_max(len(positions), batch, CONTEXT, heads)
    seen = {}
    for row, queries, sequence, position, chunk in items.tolist():
        assert 1 <= queries <= tile_queries(heads)
        for i in range(queries):
            assert (sequences[row + i], positions[row + i]) == (sequence, position + i)
            seen.setdefault(row + i, []).append(chunk)
    for row, position in enumerate(positions.tolist()):
        # A tile's later queries may see a chunk more, in which this one finds nothing.
        needed = list(range(chunks_of(position + 1)))
        assert sorted(seen.get(row, []))[: len(needed)] == needed
        assert row not in seen or position >= 0


def test_the_items_of_the_docstring():
    sequences = np.array([5, *[0] * 15, *[2] * 20], np.int32)
    positions = np.array([70, *[-1] * 15, *range(20)], np.int32)
    found = plan_items(sequences, positions, 8)
    assert found.tolist() == [[0, 1, 5, 70, 0], [32, 4, 2, 16, 0], [16, 16, 2, 0, 0]]


def test_a_prompt_that_follows_an_empty_row_of_its_own_sequence_is_not_part_of_it():
    items = plan_items(np.zeros(4, np.int32), np.array([-1, 0, 1, 2], np.int32), 8)
    assert items.tolist() == [[1, 3, 0, 0, 0]]


class World:
    """Queries of T tokens of B sequences, whose pages lie in any order."""

    def __init__(self, tokens=7, batch=3, heads=4, kv_heads=2, channels=64, pages=2):
        dice = np.random.default_rng(0)
        draw = lambda *shape: jnp.asarray(dice.standard_normal(shape), jnp.float32)
        self.q, self.sinks = draw(tokens, heads, channels), draw(heads)
        self.k, self.v = (draw(batch * pages, kv_heads, PAGE_TOKENS, channels) for _ in "kv")
        self.table = jnp.asarray(dice.permutation(batch * pages).reshape(batch, pages), jnp.int32)
        self.sequences = dice.integers(0, batch, tokens).astype(np.int32)
        self.positions = dice.integers(0, pages * PAGE_TOKENS, tokens).astype(np.int32)

    def by_the_model(self, **options):
        pages = self.table[self.sequences]
        return attend_pages(self.q, self.k, self.v, pages, jnp.asarray(self.positions), **options)


@pytest.mark.parametrize(("window", "sinks"), [(0, False), (70, True)])
def test_the_reference_is_what_the_models_attention_computes(window, sinks):
    world = World()
    options = {"window": window, "sinks": world.sinks if sinks else None}
    places = world.table, jnp.asarray(world.sequences), jnp.asarray(world.positions)
    found = attention_reference(world.q, world.k, world.v, *places, scale=0.125, **options)
    np.testing.assert_allclose(found, world.by_the_model(**options), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "channels", "context"),
    [(32, 4, 128, 4096), (64, 8, 64, 2 * CHUNK_TOKENS), (28, 4, 128, 1024), (16, 16, 128, 1024)],
)
def test_attention_lowers(heads, kv_heads, channels, context):
    tokens, batch, pages = 80, 16, context // PAGE_TOKENS
    cache = like((500, kv_heads, PAGE_TOKENS, channels), jnp.bfloat16)
    items = like((items_max(tokens, batch, context, heads // kv_heads), len(FIELDS)), np.int32)
    operands = like((tokens,), np.int32), items, like((1,), np.int32), like((heads,), jnp.bfloat16)

    def run(q, k, v, table, positions, items, count, sinks):
        return attend(q, k, v, table, positions, items, count, window=128, sinks=sinks)

    table = like((batch, pages), np.int32)
    text = lowered(
        run, like((tokens, heads, channels), jnp.bfloat16), cache, cache, table, *operands
    )
    assert len(kernels(text)) == 1 + (chunks_of(context) > 1)


def test_what_the_kernel_does_not_take_is_refused():
    assert fits(32, 4, 128, 64)
    assert not any((fits(32, 4, 96, 64), fits(32, 4, 128, 16), fits(130, 2, 128, 64)))
    q, cache = jnp.zeros((1, 2, 32), jnp.bfloat16), jnp.zeros((1, 1, 64, 32), jnp.bfloat16)
    rest = jnp.zeros(1, jnp.int32), jnp.zeros((1, 5), jnp.int32), jnp.zeros(1, jnp.int32)
    with pytest.raises(NotImplementedError, match="2 heads of 32 channels"):
        attend(q, cache, cache, jnp.zeros((1, 1), jnp.int32), *rest)


def test_elsewhere_than_on_a_gpu_the_reference_follows_the_items():
    world = World(tokens=9)
    world.sequences = np.array([2, 0, 0, 1, 1, 1, 1, 1, 0], np.int32)
    world.positions = np.array([70, -1, -1, 3, 4, 5, 6, 7, 127], np.int32)
    found = plan_items(world.sequences, world.positions, 2)
    items = np.concatenate([found, np.full((2, 5), 7, np.int32)])
    work = jnp.asarray(world.positions), jnp.asarray(items), jnp.array([len(found)])
    y = attend(world.q, world.k, world.v, world.table, *work, window=60)
    real = world.positions >= 0
    np.testing.assert_allclose(y[real], world.by_the_model(window=60)[real], rtol=2e-5, atol=2e-6)
