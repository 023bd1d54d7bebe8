"""Promises of the expert GEMM, one class for all implementations."""

import functools
import inspect

import jax
import numpy as np
import pytest

from pallas_kernels.expert_gemm.api import expert_gemm
from pallas_kernels.expert_gemm.mlp import ExpertMlp
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


def biased_experts(width: int, layers: int = 2, seed: int = 5):
    """A bank with biases below its F rows: `[S L 3 F+b D]`, and F."""
    bank = some_experts(layers=layers)
    rows = -(-max(bank.shape[-2], bank.shape[-1]) // bank.shape[-1]) if width else 0
    below = np.random.default_rng(seed).normal(0, 1, (*bank.shape[:3], rows, bank.shape[-1]))
    return np.concatenate([bank, below.astype(np.float32)], axis=3)


def with_mlp(rows, slots, bank, mlp, layer=0):
    run = jax.jit(functools.partial(expert_gemm, layer=layer, tile_rows=4, mlp=mlp))
    return np.asarray(run(rows, slots, bank))


def plain_expert(x, expert, width, mlp):
    """One row through one expert, written out in float64."""
    x, expert = x.astype(np.float64), expert.astype(np.float64)
    below = expert[:, width:].reshape(3, -1)
    gate = expert[0, :width] @ x + (below[0, :width] if mlp.bias_width else 0)
    up = expert[1, :width] @ x + (below[1, :width] if mlp.bias_width else 0)
    if mlp.activation == "swiglu":
        hidden = gate / (1 + np.exp(-gate)) * up
    else:
        gate, up = np.minimum(gate, mlp.limit), np.clip(up, -mlp.limit, mlp.limit)
        hidden = gate / (1 + np.exp(-mlp.slope * gate)) * (up + 1)
    return hidden @ expert[2, :width] + (below[2, : len(x)] if mlp.bias_width else 0)


@pytest.mark.parametrize("activation", ["swiglu", "clamped_swiglu"])
@pytest.mark.parametrize("biased", [True, False])
def test_biases_and_the_clamped_activation_are_those_of_the_formula(activation, biased):
    rows, slots = received(1)
    width = some_experts().shape[-2]
    bank = biased_experts(width) if biased else some_experts(layers=2)
    # A limit that many values reach.
    mlp = ExpertMlp(activation, limit=0.5, slope=1.702, bias_width=width if biased else 0)
    found = with_mlp(rows, slots, bank, mlp, layer=1)
    wanted = np.zeros_like(found, np.float64)
    for source, token, choice in zip(*np.nonzero(slots >= 0), strict=True):
        expert = bank[slots[source, token, choice], 1]
        wanted[source, token, choice] = plain_expert(rows[source, token], expert, width, mlp)
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)
    oracle = np.asarray(expert_gemm_reference(rows, slots, bank[:, 1], mlp))
    np.testing.assert_allclose(oracle, wanted, rtol=2e-5, atol=2e-5)


def test_rows_of_zeros_below_the_biases_change_no_bit():
    """Padding, as the bank of a GPU has it."""
    rows, slots = received(4)
    width = some_experts().shape[-2]
    bank, mlp = biased_experts(width), ExpertMlp("clamped_swiglu", bias_width=width)
    padded = np.pad(bank, [(0, 0)] * 3 + [(0, 7), (0, 0)])
    run = functools.partial(with_mlp, rows, slots, mlp=mlp)
    np.testing.assert_array_equal(run(bank), run(padded))


def test_a_bank_without_room_for_its_biases_is_refused():
    rows, slots = received()
    bank = some_experts()
    with pytest.raises(ValueError, match="no room for biases"):
        with_mlp(rows, slots, bank, ExpertMlp(bias_width=bank.shape[-2]))


def test_an_mlp_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="activation='gelu' must be one of"):
        ExpertMlp("gelu")
