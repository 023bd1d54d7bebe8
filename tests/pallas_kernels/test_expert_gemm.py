"""Promises of the expert GEMM, one class for all implementations."""

import functools
import inspect

import jax
import numpy as np
import pytest

from pallas_kernels.expert_gemm.api import expert_gemm
from pallas_kernels.expert_gemm.reference import expert_gemm_reference
from tests.support.kernels import an_exchange, naive_dispatch, naive_experts, some_experts

# float32 products of 16 and then 8 terms near one, against float64.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def reference(rows, slots, bank, layer=0, tile_rows=8):
    return np.asarray(expert_gemm_reference(rows, slots, bank[:, layer]))


@functools.cache
def compiled(layer, tile_rows):
    return jax.jit(functools.partial(expert_gemm, layer=layer, tile_rows=tile_rows))


def tiles(rows, slots, bank, layer=0, tile_rows=8):
    return np.asarray(compiled(layer, tile_rows)(rows, slots, bank))


def received(seed=0, rank=0, **options):
    """Rows and slots as `rank` receives them."""
    rows, here = naive_dispatch(an_exchange(seed, **options))
    return rows[rank], here[rank]


@pytest.mark.parametrize("implementation", [reference, tiles], ids=lambda f: f.__name__)
class TestExpertGemm:
    def check(self, implementation, rows, slots, bank=None, layer=0, **options):
        bank = some_experts() if bank is None else bank
        y = implementation(rows, slots, bank, layer, **options)
        np.testing.assert_allclose(y, naive_experts(rows, slots, bank[:, layer]), **CLOSE)
        assert not y[slots < 0].any(), "a choice that lies elsewhere must add nothing"

    def test_every_choice_is_the_swiglu_of_its_slot(self, implementation):
        for seed in range(6):
            self.check(implementation, *received(seed))

    def test_only_the_layer_asked_for_is_read(self, implementation):
        bank = some_experts(layers=3)
        bank[:, [0, 2]] = np.nan
        self.check(implementation, *received(), bank, layer=1)

    def test_all_choices_may_be_of_one_slot(self, implementation):
        rows, _ = received(2, only_ranks=[0], none_share=0.0)
        self.check(implementation, rows, np.full((4, 8, 3), 2, np.int32))

    def test_every_choice_received_may_be_here(self, implementation):
        self.check(implementation, *received(3, only_ranks=[0], none_share=0.0))

    def test_nothing_may_be_here(self, implementation):
        rows, slots = received(4, none_share=1.0)
        self.check(implementation, rows, slots)

    def test_slots_that_hold_garbage_disturb_no_other(self, implementation):
        rows, slots = received(5)
        slots[slots == 1] = 0
        bank = some_experts()
        bank[1] = np.nan
        self.check(implementation, rows, slots, bank)

    @pytest.mark.parametrize("tile_rows", [1, 3, 8, 64])
    def test_the_tile_size_changes_no_result(self, implementation, tile_rows):
        self.check(implementation, *received(6), tile_rows=tile_rows)


def test_a_row_has_the_same_bits_in_any_tile_at_any_place():
    random = np.random.default_rng(0)
    rows, slots = received(7, only_ranks=[0])
    bank, before = some_experts(), None
    for _ in range(5):
        order = random.permutation(rows.shape[0] * rows.shape[1])
        flat = lambda a, order=order: a.reshape(-1, a.shape[-1])[order].reshape(a.shape)
        y = tiles(flat(rows), flat(slots), bank)
        home = np.empty_like(y).reshape(-1, *y.shape[2:])
        home[order] = y.reshape(-1, *y.shape[2:])
        before = home if before is None else before
        np.testing.assert_array_equal(home, before)


def test_shapes_that_disagree_are_refused():
    # Without the checks of annotations that tests install, as a user calls it.
    call, (rows, slots) = inspect.unwrap(expert_gemm), received()
    with pytest.raises(ValueError, match="do not belong together"):
        call(rows[:, :3], slots, some_experts(), layer=0)
    with pytest.raises(ValueError, match="do not belong together"):
        call(rows, slots, some_experts(hidden=8), layer=0)
    with pytest.raises(ValueError, match=r"layer=1 is not in 0\.\.0"):
        call(rows, slots, some_experts(), layer=1)
