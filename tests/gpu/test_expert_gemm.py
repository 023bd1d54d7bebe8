"""The experts on a GPU equal their specification, and a row's bits do not depend on its tile.

EEP_TEST_PLATFORM=gpu python -m pytest tests/gpu/test_expert_gemm.py
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.expert_gemm import mosaic_gpu as gemm
from pallas_kernels.expert_gemm.api import expert_gemm
from pallas_kernels.expert_gemm.config import config_for
from pallas_kernels.expert_gemm.mlp import ACTIVATIONS, SWIGLU, ExpertMlp
from pallas_kernels.expert_gemm.reference import expert_gemm_reference
from pallas_kernels.grouping import group_rows
from pallas_kernels.handover import InArray
from tests.gpu.exchanges import Ranks, a_work, rows_of, some_loopback

pytestmark = pytest.mark.gpu
RANKS, TOKENS, CHOICES, SLOTS, LAYER = 4, 64, 8, 8, 1
SHAPE = (RANKS, TOKENS, CHOICES)
ROWS = RANKS * TOKENS
# Products of bfloat16 summed in float32; h and the result are rounded to bfloat16, 2**-9 each, and
# errors of h average out over F. Of a row; measured 2.4e-3 over all.
ERROR_MAX = 1e-2
SIZES = [(128, 128), (768, 2048), (128, 2880)]  # F, D


@functools.cache
def compiled(width: int, hidden: int, tile_rows: int, mlp: ExpertMlp = SWIGLU):
    config = config_for(tile_rows, SLOTS, width, hidden)

    def run(rows, slots, bank):
        lists = group_rows(slots, SLOTS, tile_rows)
        experts = gemm.Experts(bank, LAYER, mlp)
        return gemm.expert_gemm_mosaic(InArray(rows, CHOICES), SHAPE, lists, experts, config)

    return jax.jit(run)


@functools.cache
def wanted_by(mlp: ExpertMlp = SWIGLU):
    # TF32 products, XLA's choice on a GPU, would be less exact than what is tested.
    def run(rows, slots, bank):
        with jax.default_matmul_precision("highest"):
            wide = bank[:, LAYER].astype(jnp.float32)
            return expert_gemm_reference(rows.astype(jnp.float32), slots, wide, mlp)

    return jax.jit(run)


@functools.cache
def operands(width: int, hidden: int):
    """Rows, and a bank of two layers of which one holds NaN."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((RANKS, TOKENS, hidden), np.float32)
    bank = random.standard_normal((SLOTS, 2, 3, width, hidden), np.float32)
    bank *= np.array([hidden, hidden, width], np.float32)[:, None, None] ** -0.5
    bank[:, 1 - LAYER] = np.nan
    return tuple(jnp.asarray(values.astype(ml_dtypes.bfloat16)) for values in (rows, bank))


def with_counts(counts, seed: int = 0) -> np.ndarray:
    """Slots so that slot i gets `counts[i]` rows, of random tokens; each in its own choice."""
    random = np.random.default_rng(seed)
    slots = np.full((ROWS, CHOICES), -1, np.int32)
    for slot, count in enumerate(counts):
        slots[random.permutation(ROWS)[:count], slot] = slot
    # The choices of a token in any order.
    return np.take_along_axis(slots, np.argsort(random.random(slots.shape)), 1).reshape(SHAPE)


ROUTINGS = {
    "few rows for each slot": [3, 1, 7, 16, 2, 9, 5, 4],
    "empty slots": [0, 40, 0, 0, 17, 0, 33, 0],
    "one slot has everything": [0, 0, 0, ROWS, 0, 0, 0, 0],
    "counts at the edges of tiles": [63, 64, 65, 128, 129, 127, 1, 0],
    "every slot has everything": [ROWS] * 8,
    "nothing": [0] * 8,
}


def check(rows, slots, bank, found, mlp: ExpertMlp = SWIGLU) -> None:
    found = np.asarray(found).astype(np.float32)
    wanted = np.asarray(wanted_by(mlp)(rows, slots, bank))
    here = np.asarray(slots) >= 0
    assert np.isfinite(found[here]).all()
    error = np.linalg.norm(found[here] - wanted[here], axis=-1)
    size = np.linalg.norm(wanted[here], axis=-1)
    assert (error <= ERROR_MAX * size).all(), f"a row is off by {(error / size).max():.1e}"


@pytest.mark.parametrize("tile_rows", [64, 128])
@pytest.mark.parametrize(("width", "hidden"), SIZES)
class TestShapes:
    @pytest.mark.parametrize("routing", ROUTINGS)
    def test_every_choice_is_the_swiglu_of_its_slot(self, width, hidden, tile_rows, routing):
        rows, bank = operands(width, hidden)
        slots = with_counts(ROUTINGS[routing])
        check(rows, slots, bank, compiled(width, hidden, tile_rows)(rows, slots, bank))

    def test_slots_that_hold_garbage_disturb_no_other(self, width, hidden, tile_rows):
        rows, bank = operands(width, hidden)
        slots = with_counts([0, 65, 30, 0, 128, 3, 0, 64])
        spoiled = bank.at[jnp.array([0, 3, 6])].set(jnp.nan)
        check(rows, slots, bank, compiled(width, hidden, tile_rows)(rows, slots, spoiled))

    def test_rows_that_are_nan_disturb_no_other(self, width, hidden, tile_rows):
        rows, bank = operands(width, hidden)
        slots = with_counts([65, 65, 30, 10, 128, 3, 0, 64], seed=2)
        slots[1, ::3] = -1
        spoiled = rows.at[1, ::3].set(jnp.nan)
        check(rows, slots, bank, compiled(width, hidden, tile_rows)(spoiled, slots, bank))


@pytest.mark.parametrize("tile_rows", [64, 128])
@pytest.mark.parametrize(("width", "hidden"), [(128, 128), (256, 128), (2880, 2880)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_biases_are_added_and_the_activation_is_the_one_asked_for(
    activation, width, hidden, tile_rows
):
    rows, bank = operands(width, hidden)
    random = np.random.default_rng(1)
    below = np.zeros((SLOTS, 2, 3, 64 * hidden), np.float32)  # biases, then the bank's padding
    size = max(width, hidden)
    below[..., :size] = random.standard_normal((SLOTS, 2, 3, size))
    below[:, :, :2, width:] = below[:, :, 2:, hidden:] = 0
    below = below.reshape(SLOTS, 2, 3, 64, hidden).astype(ml_dtypes.bfloat16)
    # Some gates and ups must be clamped.
    bank = jnp.concatenate([bank * 4, jnp.asarray(below)], axis=3)
    mlp = ExpertMlp(activation, bias_width=width)
    slots = with_counts(ROUTINGS["counts at the edges of tiles"], seed=6)
    found = compiled(width, hidden, tile_rows, mlp)(rows, slots, bank)
    check(rows, slots, bank, found, mlp)


def bits(values, slots) -> np.ndarray:
    return np.asarray(values).view(np.uint16)[np.asarray(slots) >= 0]


@pytest.mark.parametrize(("width", "hidden"), SIZES)
def test_a_row_has_the_same_bits_in_tiles_of_either_size(width, hidden):
    rows, bank = operands(width, hidden)
    slots = with_counts(ROUTINGS["counts at the edges of tiles"], seed=3)
    narrow, wide = (compiled(width, hidden, tile)(rows, slots, bank) for tile in (64, 128))
    np.testing.assert_array_equal(bits(narrow, slots), bits(wide, slots))


@pytest.mark.parametrize("tile_rows", [64, 128])
def test_a_row_has_the_same_bits_at_any_place(tile_rows):
    width, hidden = SIZES[1]
    rows, bank = operands(width, hidden)
    slots = with_counts([63, 64, 65, 128, 129, 200, 31, 2], seed=4)
    run, before = compiled(width, hidden, tile_rows), None
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(ROWS)
        flat_rows = np.asarray(rows).reshape(ROWS, -1)[order].reshape(rows.shape)
        flat_slots = slots.reshape(ROWS, -1)[order]
        y = np.asarray(run(jnp.asarray(flat_rows), flat_slots.reshape(SHAPE), bank))
        home = np.empty((ROWS, CHOICES, hidden), np.uint16)
        home[order] = y.reshape(ROWS, CHOICES, -1).view(np.uint16)
        found = home[slots.reshape(ROWS, CHOICES) >= 0]
        before = found if before is None else before
        np.testing.assert_array_equal(found, before)


def test_a_row_has_the_same_bits_whatever_the_other_rows_are():
    width, hidden = SIZES[1]
    rows, bank = operands(width, hidden)
    alone = np.full(SHAPE, -1, np.int32)
    alone[2, 5, 3] = 6
    crowd = with_counts([100] * 8, seed=5)
    crowd[2, 5] = alone[2, 5]
    run = compiled(width, hidden, 64)
    one, all_of_them = (np.asarray(run(rows, slots, bank)) for slots in (alone, crowd))
    np.testing.assert_array_equal(
        one[2, 5, 3].view(np.uint16), all_of_them[2, 5, 3].view(np.uint16)
    )


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_rows_in_the_window_give_the_bits_that_rows_in_an_array_give(fp8):
    """Through the public functions, over what dispatch left; the window's lists have any order."""
    loopback = some_loopback(4, "per_rank" if fp8 else "per_choice", fp8)
    layout, width = loopback.layout, 128
    random = np.random.default_rng(6)
    bank = random.standard_normal((loopback.slots_per_rank, 1, 3, width, layout.hidden), np.float32)
    bank = jnp.asarray((bank / 16).astype(ml_dtypes.bfloat16))
    ranks = Ranks(loopback)
    # Argument `rows` is what dispatch left in the window, or the array of it.
    run = jax.jit(lambda rows, slots, bank: expert_gemm(rows, slots, bank, layer=0))
    for seed, routing in enumerate(("random", "k_hot", "zipf")):
        received = ranks.dispatch(a_work(seed, loopback, routing, none_share=0.1))
        ranks.calls = {r: call.next() for r, call in ranks.calls.items()}
        for rows, slots, *_ in received.values():
            in_window = run(rows, slots, bank)
            in_array = run(rows_of()(rows), slots, bank)
            np.testing.assert_array_equal(bits(in_window, slots), bits(in_array, slots))


def test_a_whole_exchange_with_experts_between():
    """dispatch, experts out of the window, combine: against float32 experts of the same rows."""
    loopback = some_loopback(4)
    layout, per_rank = loopback.layout, loopback.slots_per_rank
    random = np.random.default_rng(7)
    banks = random.standard_normal((4, per_rank, 1, 3, 128, layout.hidden), np.float32) / 16
    banks = banks.astype(ml_dtypes.bfloat16)
    run = jax.jit(lambda rows, slots, bank: expert_gemm(rows, slots, bank, layer=0))
    ranks, work = Ranks(loopback), a_work(8, loopback, "zipf", none_share=0.1)
    received = ranks.dispatch(work)
    results = np.zeros((4, 4, *work.slots.shape[1:], layout.hidden), np.float32)
    for rank, (rows, slots, *_) in received.items():
        results[rank] = np.asarray(run(rows, slots, jnp.asarray(banks[rank]))).astype(np.float32)
    y = ranks.combine(work, results, received)
    owner, local = work.slots // per_rank, work.slots % per_rank
    for rank in range(4):
        wanted = np.zeros_like(work.x[rank])
        for token, choice in np.ndindex(work.slots.shape[1:]):
            if work.slots[rank, token, choice] >= 0:
                expert = banks[owner[rank, token, choice], local[rank, token, choice], 0]
                gate, up, down = expert.astype(np.float64)
                x = work.x[rank, token].astype(np.float64)
                h = (gate @ x) / (1 + np.exp(-(gate @ x))) * (up @ x)
                wanted[token] += work.weights[rank, token, choice] * (h @ down)
        error = np.linalg.norm(y[rank] - wanted)
        assert error <= ERROR_MAX * np.linalg.norm(wanted)
