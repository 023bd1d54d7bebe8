"""Calls of cuDNN compute attention to the caches: a stand-in for its documented function shows it.

The stand-in checks and computes what JAX's entry into cuDNN documents; tests/gpu asks the real one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import attention_cudnn
from benchmarks.attention_cudnn import attend_cudnn, fused, page_table
from eep_jax.models.attention import attend_xla
from tests.support.lowering import like, lowered

POISON = 1e30  # of positions that nobody may read


def attend_padded(q, k, v, q_seqlen, kv_seqlen, *, scale, mask_type, return_residual):
    """Plain attention of `[N T 1 C]` to as much of `[N S 1 C]` as kv_seqlen says."""
    assert mask_type is fused.MaskType.PADDING and (np.asarray(q_seqlen) == q.shape[1]).all()
    wide = lambda array: array[:, :, 0].astype(jnp.float32)
    scores = jnp.einsum("ntc,nsc->nts", wide(q), wide(k)) * scale
    seen = jnp.arange(k.shape[1]) < kv_seqlen[:, None, None]
    scores = jnp.where(seen, scores, -jnp.inf)
    values = jnp.where(seen.swapaxes(1, 2), wide(v), 0)
    out = jnp.einsum("nts,nsc->ntc", jax.nn.softmax(scores, -1), values)
    out = out[:, :, None].astype(q.dtype)
    logarithm = jax.nn.logsumexp(scores, -1)[:, None]  # [N 1 T], as cuDNN has it
    return (out, logarithm) if return_residual else out


def attend_pages(q, k, v, q_seqlen, kv_seqlen, table_k, table_v, **options):
    """As `attend_padded`, with sequences made of the pages that the tables name."""
    fused.check_layout(
        q, k, v, None, q_seqlen, kv_seqlen, None, None, table_k, table_v,
        fused.AttentionLayout.BTNH,
    )  # fmt: skip
    whole = lambda pages, table: pages[table[:, 0, :, 0]].reshape(len(q), -1, 1, q.shape[-1])
    return attend_padded(q, whole(k, table_k), whole(v, table_v), q_seqlen, kv_seqlen, **options)


@pytest.fixture
def cudnn(monkeypatch):
    monkeypatch.setattr(fused, "dot_product_attention", attend_padded)
    monkeypatch.setattr(fused, "paged_attention", attend_pages)


def a_world(length, window, scale=None, sinks=False):
    """Caches of B sequences, T tokens somewhere in them, and options of a layer."""
    tokens, sequences, kv_heads, group, channels = 4, 8, 2, 3, 8
    random = np.random.default_rng(length + window)
    normal = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.bfloat16)
    cache = lambda: normal(sequences, kv_heads, length, channels)
    sinks = normal(kv_heads * group) if sinks else None
    options = {"scale": scale, "window": window, "sinks": sinks}
    positions = random.integers(0, length, tokens).astype(np.int32)
    batch_rows = random.integers(0, sequences, tokens).astype(np.int32)
    q = normal(tokens, kv_heads * group, channels)
    return q, cache(), cache(), jnp.asarray(positions), jnp.asarray(batch_rows), options


@pytest.mark.parametrize(
    "world",
    [
        {"length": 256, "window": 0, "sinks": True},
        {"length": 256, "window": 9, "scale": 0.5},
        {"length": 12, "window": 500},
    ],
    ids=["pages and sinks", "a window", "no pages and a window of everything"],
)
def test_what_cudnn_is_asked_is_attention_to_the_caches(world):
    q, k, v, positions, batch_rows, options = a_world(**world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "dot_product_attention", attend_padded)
        patch.setattr(fused, "paged_attention", attend_pages)
        wanted = attend_xla(q, k[batch_rows], v[batch_rows], positions, **options)
        found = attend_cudnn(q, k, v, positions, batch_rows, **options)
        np.testing.assert_allclose(
            found.astype(np.float32), wanted.astype(np.float32), atol=0.03, rtol=0.02
        )
        # Whatever lies beyond a position changes nothing.
        beyond = np.arange(k.shape[2])[None, None, :, None] > np.asarray(positions).max()
        spoilt = [jnp.where(beyond, POISON, cache) for cache in (k, v)]
        again = attend_cudnn(q, *spoilt, positions, batch_rows, **options)
        np.testing.assert_array_equal(found, again)
        own = k[: len(q)], v[: len(q)]
        wanted = attend_cudnn(q, *own, positions, jnp.arange(len(q)), **options)
        found = attend_cudnn(q, *own, positions, **options)
        np.testing.assert_array_equal(found, wanted)


def test_a_table_names_the_pages_of_each_key_head():
    table = page_table(jnp.array([1, 0]), (2, 1, 256), 128)
    assert table[:, 0, :, 0].tolist() == [[2, 3], [0, 1]]
    table = page_table(jnp.array([3]), (4, 2, 256), 128)
    # As many entries as pages; those of other caches' places are never looked up.
    assert table[:, 0, :2, 0].tolist() == [[12, 13], [14, 15]] and table.size == 16


@pytest.mark.parametrize("options", [{}, {"window": 128}, {"sinks": True}], ids=str)
@pytest.mark.parametrize("found", [False, True], ids=["own", "looked up"])
def test_it_lowers_to_one_call_of_cudnn(monkeypatch, options, found):
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(fused, "check_compute_capability", lambda _: True)
    options = options | ({"sinks": jnp.zeros(8)} if "sinks" in options else {})
    cache, q = like((16, 2, 256, 64), jnp.bfloat16), like((16, 8, 64), jnp.bfloat16)
    at = like((16,), np.int32)
    attend = functools.partial(attend_cudnn, **options)
    text = lowered(attend, q, cache, cache, at, *([at] if found else [])).replace("\\22", '"')
    assert text.count("__cudnn$fmhaSoftmax") == 1
    paged = found and "window" not in options
    assert text.count('"is_paged_attention": true') == paged
    gathered = text.count('"stablehlo.gather"') + text.count('"stablehlo.dynamic_gather"')
    assert gathered == (2 if "window" in options else 0)


def test_on_a_cpu_and_in_float32_xla_does_it():
    q, k = jnp.zeros((2, 2, 8), jnp.bfloat16), jnp.zeros((2, 2, 16, 8), jnp.bfloat16)
    assert not attention_cudnn.fits_cudnn(q, k), "there is no GPU"
