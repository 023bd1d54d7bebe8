"""Promises of the parts of a model: routing, attention, cache, weights and bank of experts."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from eep_jax.heap.loopback import LoopbackHeap, open_all
from eep_jax.models.attention import rope
from eep_jax.models.decoder import add
from eep_jax.models.expert_bank import ExpertBank, slab_layout
from eep_jax.models.kv_cache import empty_cache
from eep_jax.models.paged_attention import attend_pages
from eep_jax.models.router import route
from eep_jax.models.weights import (
    build_dense_model,
    decoder_graph,
    dense_names,
    expert_name,
    merge_decoder,
    split_model,
)
from eep_jax.placement.placement import EMPTY
from tests.support.models import a_model, a_run, rounded_weights, some_weights


def test_weights_are_the_best_probabilities_divided_by_their_sum():
    logits = jnp.log(jnp.array([[0.4, 0.2, 0.3, 0.1]]))
    ids, weights = route(logits, 2, norm_topk_prob=True)
    assert ids.tolist() == [[0, 2]]
    np.testing.assert_allclose(weights, [[4 / 7, 3 / 7]], rtol=1e-6)
    np.testing.assert_allclose(route(logits, 2, False)[1], [[0.4, 0.3]], rtol=1e-6)


def test_equal_scores_go_to_the_lower_expert():
    assert route(jnp.zeros((1, 5)), 3, True)[0].tolist() == [[0, 1, 2]]


def test_rotation_keeps_lengths_and_depends_on_the_distance_alone():
    random = np.random.default_rng(0)
    q, k = (jnp.asarray(random.standard_normal((1, 1, 8)), jnp.float32) for _ in "qk")
    turn = lambda x, position: rope(x, jnp.array([position]), 10_000.0)
    np.testing.assert_allclose(jnp.sum(turn(q, 9) ** 2), jnp.sum(q**2), rtol=1e-5)
    near, far = (jnp.sum(turn(q, 5 + at) * turn(k, 2 + at)) for at in (0, 30))
    np.testing.assert_allclose(near, far, rtol=1e-4)
    np.testing.assert_array_equal(turn(q, 0), q)


class TestKVCache:
    RUN = a_run()  # pages of 8

    def written(self, batch_rows, positions):
        cache = empty_cache(self.RUN)
        k = np.arange(1, len(positions) + 1, dtype=np.float32)[:, None, None] * np.ones((1, 1, 8))
        table = np.array([[5, 3], [9, 9], [4, 0]], np.int32)
        places = cache.places_of(table, np.array(batch_rows), np.array(positions))
        return cache.write(1, places, k, -k)

    def test_each_token_is_written_to_its_page_of_its_layer(self):
        cache = self.written([2, 0], [5, 15])
        assert np.argwhere(cache.keys[1].any(axis=-1)).tolist() == [[3, 0, 7], [4, 0, 5]]
        assert float(cache.keys[1][4, 0, 5, 0]) == 1 and float(cache.values[1][3, 0, 7, 0]) == -2
        assert not cache.keys[0].any() and not cache.values[0].any()

    def test_an_empty_row_writes_nothing(self):
        cache = self.written([0, 2], [-1, -1])
        assert not cache.keys[1].any() and not cache.values[1].any()

    def test_there_is_room_for_all_contexts_unless_less_is_asked_for(self):
        assert empty_cache(self.RUN).keys[0].shape == (4 * 6, 1, 8, 8)
        assert empty_cache(a_run(kv_pages=7)).keys[0].shape == (7, 1, 8, 8)


def test_a_model_survives_being_split_into_named_weights():
    model = a_model()
    dense, experts = some_weights(model)
    named = {expert_name(e): experts[e] for e in range(model.experts)}
    again_dense, again_experts = split_model(build_dense_model(model, dense, named), model)
    assert set(dense) == set(again_dense) == set(dense_names(model))
    for name, weights in (dense | named).items():
        np.testing.assert_array_equal((again_dense | again_experts)[name], weights)


def test_names_carry_the_shapes_of_the_weights():
    model = a_model()
    shapes = {name: leaf.shape for name, leaf in dense_names(model).items()}
    assert shapes == {name: weights.shape for name, weights in some_weights(model)[0].items()}


def test_a_decoder_is_rebuilt_from_its_leaves_without_a_copy():
    model = a_model()
    dense, _ = some_weights(model)
    graph, names = decoder_graph(model)
    leaves = [jnp.asarray(dense[name]) for name in names]
    decoder = merge_decoder(graph, leaves)
    assert decoder.head.kernel[...] is leaves[list(names).index("head/kernel")]


def test_names_of_experts_sort_like_experts():
    assert [expert_name(e) for e in (7, 15, 123)] == ["e007", "e015", "e123"]


class TestExpertBank:
    def banks(self, ranks=2, **dtypes):
        config = a_run(ranks)
        slots = config.cluster.slots_per_rank
        layout = slab_layout(config.model, config.engine, ranks, slots, **dtypes)
        return [ExpertBank(layout, heap) for heap in open_all(ranks, layout.slab_bytes)]

    def test_a_slot_names_its_expert_once_it_is_written(self):
        bank, _ = self.banks()
        assert set(bank.contents) == {EMPTY}
        bank.write(3, 6, some_weights(a_model())[1][6])
        assert bank.contents[3] == 6 and bank.contents.count(EMPTY) == 7
        bank.clear(3)
        assert set(bank.contents) == {EMPTY}

    def test_a_slot_that_could_not_be_written_holds_no_expert(self):
        bank, _ = self.banks()
        bank.write(3, 6, some_weights(a_model())[1][6])
        with pytest.raises(ValueError):
            bank.write(3, 5, np.zeros(7))
        assert bank.contents[3] == EMPTY

    def test_a_peer_reads_what_was_written(self):
        bank, peer = self.banks()
        experts = some_weights(a_model())[1]
        bank.write(3, 6, experts[6])
        np.testing.assert_array_equal(peer.read_peer(0, 3), experts[6])
        assert bank.expert_bytes == experts[6].nbytes

    def test_experts_are_padded_with_zeros_to_what_a_gpu_computes_at_once(self):
        config = a_run(2)
        layout = slab_layout(config.model, config.engine, 2, 4, bank_dtype="bfloat16")
        width = config.model.expert_hidden
        assert width % 64 and layout.bank.shape[3] == 64
        heap = LoopbackHeap(0, 2, layout.slab_bytes)
        bank = ExpertBank(layout, heap)
        heap.write(layout.bank.offset, np.full(layout.bank.bytes, 0xFF, np.uint8))
        expert = some_weights(config.model)[1][5].astype(ml_dtypes.bfloat16)
        bank.write(2, 5, expert)
        slot = layout.slot(2)
        whole = heap.read(0, slot.offset, slot.bytes).view(slot.dtype).reshape(slot.shape)
        np.testing.assert_array_equal(whole[:, :, :width], expert)
        assert not whole[:, :, width:].any()
        np.testing.assert_array_equal(bank.read(2), expert)

    def test_a_bank_of_bfloat16_holds_experts_as_a_checkpoint_stores_them(self):
        bank, peer = self.banks(row_dtype="bfloat16", bank_dtype="bfloat16")
        experts = some_weights(a_model())[1]
        stored = experts.astype(ml_dtypes.bfloat16)
        bank.write(3, 6, stored[6])
        bank.write(4, 2, experts[2])
        for slot, expert in ((3, 6), (4, 2)):
            assert bank.read(slot).dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(bank.read(slot), stored[expert])
            np.testing.assert_array_equal(peer.read_peer(0, slot), stored[expert])
        assert bank.expert_bytes == stored[6].nbytes == experts[6].nbytes // 2

    def test_what_was_read_is_not_changed_by_the_next_write(self):
        bank, _ = self.banks()
        experts = some_weights(a_model())[1]
        bank.write(0, 1, experts[1])
        found = bank.read(0)
        bank.write(0, 2, experts[2])
        np.testing.assert_array_equal(found, experts[1])

    @pytest.mark.parametrize("slot", [-1, 8])
    def test_a_slot_that_is_none_is_refused(self, slot):
        bank, _ = self.banks()
        with pytest.raises(ValueError, match=f"slot {slot} is not in 0..7"):
            bank.read(slot)
        with pytest.raises(ValueError, match=f"slot {slot} is not in 0..7"):
            bank.write(slot, 1, some_weights(a_model())[1][1])
        assert set(bank.contents) == {EMPTY}

    def test_the_bank_lies_behind_the_window_on_its_own_pages(self):
        layout = self.banks()[0].layout
        assert layout.bank.offset % 4096 == 0 and layout.slab_bytes % 4096 == 0
        assert layout.window.window_bytes <= layout.bank.offset
        assert layout.bank.offset + layout.bank.bytes <= layout.slab_bytes

    def test_the_weights_of_a_bank_are_the_heaps_memory(self):
        config = a_run(1)
        layout = slab_layout(config.model, config.engine, 1, config.cluster.slots_per_rank)
        heap = LoopbackHeap(0, 1, layout.slab_bytes)
        bank = ExpertBank(layout, heap)
        bank.write(0, 1, some_weights(a_model())[1][1])
        region = heap.whole()[0, layout.bank.offset :][: bank.expert_bytes]
        assert region.tobytes() == some_weights(a_model())[1][1].tobytes()


class TestBfloat16:
    """Weights and activations in half the bytes; what sums or rotates stays float32."""

    def models(self):
        model = a_model(hidden=64, head_dim=16)
        dense, experts = rounded_weights(model)
        named = {expert_name(e): experts[e] for e in range(model.experts)}
        build = lambda dtype: build_dense_model(model, dense, named, dtype)
        return model, build(jnp.float32), build(jnp.bfloat16)

    def test_logits_are_those_of_float32_but_for_rounding(self):
        model, wide, narrow = self.models()
        random = np.random.default_rng(0)
        tokens = jnp.asarray(random.integers(0, model.vocab_size, (4, 24)), jnp.int32)
        (wanted, wide_routes), (found, routes) = wide(tokens), narrow(tokens)
        assert wanted.dtype == found.dtype == jnp.float32
        # Where two experts are nearly as good the other one may be chosen, which is no rounding,
        # and later tokens attend to the outcome.
        pairs = zip(wide_routes, routes, strict=True)
        same = np.all([jnp.all(a == b, axis=-1) for (a, _), (b, _) in pairs], axis=0)
        clean = np.logical_and.accumulate(same, axis=1)
        assert clean.mean() > 0.3
        error = np.linalg.norm(found - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
        # Eight bits of mantissa, rounded some twenty times on the way.
        assert np.median(error) < 0.02 and error[clean].max() < 0.04

    def test_every_activation_has_the_dtype_and_every_score_is_float32(self):
        model, _, narrow = self.models()
        layer, x = narrow.decoder.layers[0], narrow.decoder.embed(jnp.arange(4))
        q, k, v = layer.before_attention(x, jnp.arange(4))
        cache = jnp.zeros((4, model.kv_heads, 10, model.head_dim), jnp.bfloat16)
        context = attend_pages(q, cache, cache, jnp.arange(4)[:, None], jnp.arange(4))
        after, normed, _, weights = layer.after_attention(x, context)
        assert {a.dtype for a in (x, q, k, v, context, after, normed)} == {jnp.dtype("bfloat16")}
        assert {weights.dtype, layer.router(normed).dtype} == {jnp.dtype("float32")}
        assert narrow.decoder.logits(x).dtype == jnp.float32

    def test_a_sum_of_experts_is_rounded_once(self):
        x, y = jnp.ones(3, jnp.bfloat16), jnp.full(3, 2**-8, jnp.float32)
        assert add(x, 3 * y / 2).dtype == jnp.bfloat16
        np.testing.assert_array_equal(add(x, 3 * y / 2), jnp.full(3, 1 + 2**-7, jnp.bfloat16))

    def test_the_cache_is_of_the_engines_dtype(self):
        engine = dataclasses.replace(a_run().engine, dtype="bfloat16")
        cache = empty_cache(dataclasses.replace(a_run(), platform="gpu", engine=engine))
        kept = jax.tree.leaves((cache.keys, cache.values))
        assert {leaf.dtype for leaf in kept} == {jnp.dtype("bfloat16")}

    def test_far_positions_keep_their_angle(self):
        x = jnp.ones((1, 1, 8), jnp.bfloat16)
        near, far = (rope(x, jnp.array([p]), 10_000.0) for p in (4000, 4001))
        wanted = rope(x.astype(jnp.float32), jnp.array([4001]), 10_000.0)
        np.testing.assert_allclose(far.astype(jnp.float32), wanted, atol=2**-8)
        assert (near != far).any()


def test_jax_computes_on_the_cpu_here():
    assert jax.default_backend() == "cpu"
