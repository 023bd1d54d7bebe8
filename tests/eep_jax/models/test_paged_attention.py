"""Attention to pages is attention to the whole text, with the same bits wherever a token stands."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eep_jax.models.attention import attend_causal
from eep_jax.models.latent_attention import attend_latent
from eep_jax.models.paged_attention import attend_latent_pages, attend_pages

LENGTH = 200  # several blocks
HEADS, KV_HEADS, CHANNELS = 4, 2, 8
OPTIONS = pytest.mark.parametrize(
    "options",
    [{}, {"window": 70}, {"sinks": True}, {"window": 70, "sinks": True, "scale": 0.2}],
    ids=str,
)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def in_pages(text: np.ndarray, size: int, order: np.ndarray) -> jax.Array:
    """`[P H C]` as pages `[N H size C]`, page j at `order[j]`; NaN wherever there is no text."""
    pages = np.full((len(order) + 3, text.shape[1], size, text.shape[2]), np.nan, np.float32)
    for position, row in enumerate(text):
        pages[order[position // size], :, position % size] = row
    return jnp.asarray(pages)


def with_sinks(options: dict) -> dict:
    return options | ({"sinks": jnp.asarray(draw(9, HEADS))} if options.get("sinks") else {})


@OPTIONS
@pytest.mark.parametrize("size", [4, 16, 64, 100])
def test_pages_hold_what_the_whole_text_would(size, options):
    options = with_sinks(options)
    q, k, v = (
        draw(0, LENGTH, HEADS, CHANNELS),
        *(draw(n, LENGTH, KV_HEADS, CHANNELS) for n in (1, 2)),
    )
    whole = lambda *parts: attend_causal(*(jnp.asarray(part)[None] for part in parts), **options)
    wanted = whole(q, k, v)[0]
    order = np.random.default_rng(3).permutation(-(-LENGTH // size) + 2)
    keys, values = (in_pages(part, size, order) for part in (k, v))
    positions = np.arange(LENGTH, dtype=np.int32)
    pages = np.broadcast_to(order[: -(-LENGTH // size)], (LENGTH, -(-LENGTH // size)))
    attend = jax.jit(functools.partial(attend_pages, **options))
    found = attend(jnp.asarray(q), keys, values, jnp.asarray(pages, jnp.int32), positions)
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-6)


@OPTIONS
def test_bits_do_not_depend_on_the_tokens_beside_nor_on_the_pages(options):
    options = with_sinks(options)
    rows, size = 8, 16
    q = draw(0, rows, HEADS, CHANNELS)
    k, v = (draw(number, LENGTH, KV_HEADS, CHANNELS) for number in (1, 2))
    attend = jax.jit(functools.partial(attend_pages, **options))
    found = {}
    for seed in range(4):
        dice = np.random.default_rng(seed)
        order = dice.permutation(-(-LENGTH // size) + seed)
        keys, values = (in_pages(part, size, order) for part in (k, v))
        pages = np.broadcast_to(order[: -(-LENGTH // size)], (rows, -(-LENGTH // size)))
        positions = np.array([3, 70, 0, 199, 64, 63, 128, 150], np.int32)
        order = dice.permutation(rows)
        # Others beside it read further, or less far.
        beside = np.where(np.arange(rows) < 6, positions[order], 10 * seed).astype(np.int32)
        out = attend(jnp.asarray(q[order]), keys, values, jnp.asarray(pages, jnp.int32), beside)
        for row in range(6):
            bits = np.asarray(out[row]).view(np.uint32)
            known = found.setdefault(int(order[row]), bits)
            np.testing.assert_array_equal(bits, known)


def test_latents_in_pages_are_the_latents_of_the_whole_text():
    rank, turned, size = 12, 4, 16
    q = jnp.asarray(draw(0, LENGTH, HEADS, rank + turned))
    k, v = draw(1, LENGTH, 1, turned), draw(2, LENGTH, 1, rank)
    positions = jnp.arange(LENGTH)
    beside = lambda part: jnp.broadcast_to(jnp.asarray(part[:, 0]), (LENGTH, *part[:, 0].shape))
    wanted = attend_latent(q, beside(k), beside(v), positions, scale=0.3)
    order = np.random.default_rng(3).permutation(-(-LENGTH // size))
    keys, values = (in_pages(part, size, order) for part in (k, v))
    pages = jnp.broadcast_to(jnp.asarray(order, jnp.int32), (LENGTH, len(order)))
    found = attend_latent_pages(q, keys, values, pages, positions, scale=0.3)
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-6)
