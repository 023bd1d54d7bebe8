"""Promises of WindowLayout: regions never overlap, and each writer has its own part."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.window import (
    REGION_ALIGNMENT_BYTES,
    SCALE_CHANNELS,
    WindowLayout,
    round_up,
)

SIZES = {
    "ranks": st.integers(1, 9),
    "tokens": st.integers(1, 20),
    "choices": st.integers(1, 6),
    "combine": st.sampled_from(["per_choice", "per_rank"]),
}
plain_layouts = st.builds(
    WindowLayout,
    hidden=st.integers(1, 40),
    row_dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    **SIZES,
)
fp8_layouts = st.builds(
    WindowLayout,
    hidden=st.integers(1, 3).map(lambda n: n * SCALE_CHANNELS),
    row_dtype=st.just("bfloat16"),
    dispatch_dtype=st.just("float8_e4m3fn"),
    **SIZES,
)
layouts = plain_layouts | fp8_layouts
VECTOR_BYTES = 16  # the widest access of a GPU thread
BY_WRITER = {"wake": 0, "sent": 1, "returned": 1, "votes": 1, "slots": 1, "weights": 1}
BY_WRITER |= {"rows": 1, "returns": 1}  # the axis that names the writer


@given(layouts)
def test_regions_are_aligned_apart_and_inside_the_window(layout):
    end = 0
    for region in sorted(layout.regions.values(), key=lambda r: r.offset):
        assert region.offset % REGION_ALIGNMENT_BYTES == 0
        assert region.offset >= end, f"{region.name} overlaps what is before it"
        end = region.offset + region.bytes
    assert end <= layout.window_bytes


@given(layouts)
def test_row_bytes_is_the_distance_of_two_rows_and_results_travel_in_the_row_dtype(layout):
    rows, returns = layout.regions["rows"], layout.regions["returns"]
    shape = (2, layout.ranks, layout.tokens)
    assert rows.shape[:3] == shape
    assert rows.bytes == 2 * layout.ranks * layout.tokens * layout.row_bytes
    choices = (layout.choices,) if layout.combine == "per_choice" else ()
    assert returns.shape == (*shape, *choices, layout.hidden)
    assert returns.dtype == np.dtype(layout.row_dtype)


@given(fp8_layouts)
def test_a_row_in_fp8_has_its_values_then_its_scales_and_starts_where_a_vector_may(layout):
    scales_bytes = 4 * (layout.hidden // SCALE_CHANNELS)
    assert layout.row_bytes - layout.hidden - scales_bytes in range(VECTOR_BYTES)
    assert layout.row_bytes % VECTOR_BYTES == 0
    assert layout.regions["rows"].dtype == np.uint8


def test_a_row_of_7168_channels_in_fp8_has_7392_bytes():
    layout = WindowLayout(1, 1, 1, 7168, row_dtype="bfloat16", dispatch_dtype="float8_e4m3fn")
    assert layout.row_bytes == 7168 + 56 * 4 == 7392


def test_fp8_rows_need_whole_scales_and_no_other_narrow_dtype_is_known():
    with pytest.raises(ValueError, match=r"hidden=192 must be a multiple of 128 .* dispatch_dtype"):
        WindowLayout(1, 1, 1, 192, dispatch_dtype="float8_e4m3fn")
    with pytest.raises(ValueError, match="dispatch_dtype='int8' must be '' or 'float8_e4m3fn'"):
        WindowLayout(1, 1, 1, 128, dispatch_dtype="int8")


@given(layouts)
def test_the_bytes_a_writer_can_reach_belong_to_no_other_writer(layout):
    heap = np.zeros((1, layout.window_bytes), np.uint8)
    (window,) = layout.views(heap)
    for writer in range(layout.ranks):
        before = heap.copy()
        for name, axis in BY_WRITER.items():
            view = np.moveaxis(window[name], axis, 0)
            touched = np.frombuffer(view[writer].tobytes(), np.uint8)
            assert not touched.any(), f"rank {writer} shares bytes of {name}"
            view[writer] = np.array(writer + 1, view.dtype)
        own = heap != before
        assert own.any() and not before[own].any()


def test_only_the_ranks_own_words_are_outside_the_writers_parts():
    regions = WindowLayout(ranks=2, tokens=1, choices=1, hidden=1).regions
    assert set(regions) - set(BY_WRITER) == {"abort", "doorbell", "ticket"}


@given(layouts, st.integers(1, 3))
def test_views_alias_the_heap_rank_by_rank(layout, ranks):
    heap = np.zeros((ranks, round_up(layout.window_bytes, 256)), np.uint8)
    for rank, window in enumerate(layout.views(heap)):
        window["rows"][...] = 1
        assert heap[rank].any() and not heap[rank + 1 :].any()


@pytest.mark.parametrize("name", ["ranks", "tokens", "choices", "hidden"])
def test_a_size_below_one_is_refused_by_name(name):
    good = WindowLayout(ranks=2, tokens=2, choices=2, hidden=2)
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        dataclasses.replace(good, **{name: 0})


def test_an_unknown_mode_is_refused_by_name():
    with pytest.raises(ValueError, match="combine='sum' must be 'per_choice' or 'per_rank'"):
        WindowLayout(ranks=1, tokens=1, choices=1, hidden=1, combine="sum")


@given(st.integers(0, 10_000), st.integers(1, 300))
def test_rounding_up_gives_the_next_multiple(size, multiple):
    assert round_up(size, multiple) - size in range(multiple)
    assert round_up(size, multiple) % multiple == 0
