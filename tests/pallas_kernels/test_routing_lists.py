"""Routing as kernels use it: the ranks that a row travels to, and the choices of each slot."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.exchange.call import ExchangeSpec
from pallas_kernels.exchange.gpu import first_of_each
from pallas_kernels.exchange.lists import RowLists
from pallas_kernels.grouping import ExpertRows, group_rows
from tests.support.kernels import check_lists, naive_targets
from tests.support.lowering import a_layout

seeds = st.integers(0, 2**32 - 1)
SLOTS = 5


def targets(slots: np.ndarray, partners, per_rank: int) -> np.ndarray:
    """The rank that each choice makes its row travel to, -1 where none does; `[T K]`."""
    there = slots >= 0
    owners = np.where(there, slots // per_rank, 0)
    heard = there & np.array(partners, bool)[owners]
    columns = [list(array.T) for array in (there, owners, heard)]
    fresh = np.stack(first_of_each(*columns), axis=1)
    return np.where(fresh, owners, -1)


lists_of = jax.jit(group_rows, static_argnums=(1, 2))


@given(seeds, st.lists(st.booleans(), min_size=4, max_size=4))
def test_a_row_travels_once_to_each_partner_that_has_one_of_its_slots(seed, partners):
    slots = np.random.default_rng(seed).integers(-1, 4 * SLOTS, (6, 4)).astype(np.int32)
    found = targets(slots, partners, SLOTS)
    np.testing.assert_array_equal(found, naive_targets(slots, partners, SLOTS))


def test_the_example_of_the_docstring():
    found = targets(np.array([[3, 19, 5]], np.int32), [True] * 3, 8)
    assert found.tolist() == [[0, 2, -1]]


def some_slots(seed: int, shape, num_slots: int, none_share: float, of_few: bool) -> np.ndarray:
    """Distinct slots for each token, some -1; `of_few` makes most tokens choose the same ones."""
    random = np.random.default_rng(seed)
    keys = random.random((*shape[:2], max(num_slots, shape[2])))
    if of_few:
        keys[..., : shape[2]] /= 100
    slots = np.argsort(keys, axis=-1)[..., : shape[2]].astype(np.int32)
    return np.where((random.random(shape) < none_share) | (slots >= num_slots), -1, slots)


# A few shapes only: each is compiled. (R, T, K), S, rows of a tile
LISTS = [
    ((1, 1, 1), 1, 64),
    ((2, 8, 4), 8, 64),
    ((4, 40, 4), 3, 64),
    ((2, 128, 4), 5, 128),
    ((3, 7, 2), 40, 4),
]


@given(st.sampled_from(LISTS), seeds, st.sampled_from([0.0, 0.3, 0.9, 1.0]), st.booleans())
def test_every_choice_is_listed_once_and_in_one_tile(sizes, seed, none_share, of_few):
    shape, num_slots, tile_rows = sizes
    slots = some_slots(seed, shape, num_slots, none_share, of_few)
    check_lists(lists_of(slots, num_slots, tile_rows), slots, num_slots, tile_rows)


@pytest.mark.parametrize(("shape", "num_slots", "tile_rows"), LISTS)
def test_the_kernel_and_the_function_have_outputs_of_the_same_shapes(shape, num_slots, tile_rows):
    ranks, tokens, choices = shape
    layout = a_layout(ranks, tokens, choices)
    lists = RowLists(ExchangeSpec(layout, num_slots), tokens, choices, tile_rows)
    slots = np.full(shape, -1, np.int32)
    found = lists_of(slots, num_slots, tile_rows)
    for name in ExpertRows._fields:
        assert lists.out[name][0] == getattr(found, name).shape, name


def test_all_rows_in_one_slot_fill_its_list():
    slots = np.full((2, 64, 4), -1, np.int32)
    slots[..., 2] = 6
    found = lists_of(slots, 8, 64)
    assert np.asarray(found.counts).tolist() == [0] * 6 + [128, 0]
    check_lists(found, slots, 8, 64)
