"""Each device refuses what it cannot do: by name, with the expectation and the way out."""

import dataclasses
import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.device import check_exchange, platform
from pallas_kernels.expert_gemm.api import expert_gemm
from pallas_kernels.expert_gemm.config import GemmConfig, config_for
from pallas_kernels.window import WindowLayout
from tests.support.lowering import a_layout, like, lowered, on_h100

CPU = WindowLayout(ranks=2, tokens=8, choices=4, hidden=128)


def check(layout: WindowLayout, tokens=8, hidden=128, choices=4):
    check_exchange(layout, tokens, hidden, choices)


def test_the_platform_is_that_of_the_abstract_device_where_one_is_set():
    assert platform() == "cpu"
    with on_h100():
        assert platform() == "gpu"


def test_each_device_takes_its_own_rows():
    check(CPU)
    with on_h100():
        check(a_layout())
        check(a_layout(fp8=True))
        check(a_layout(), tokens=1)


@pytest.mark.parametrize(
    ("tokens", "hidden", "choices"), [(9, 128, 4), (8, 64, 4), (8, 128, 3), (8, 256, 4)]
)
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_an_exchange_that_does_not_fit_the_window_is_refused(device, tokens, hidden, choices):
    brought = f"{tokens} tokens x {hidden} channels x {choices} choices do not fit a window of "
    wanted = brought + "8 x 128 x 4; build the WindowLayout for them"
    with pytest.raises(ValueError, match=wanted):
        if device == "cpu":
            check(CPU, tokens, hidden, choices)
        else:
            with on_h100():
                check(a_layout(), tokens, hidden, choices)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"row_dtype": "bfloat16"}, "row_dtype='bfloat16', dispatch_dtype=''"),
        ({"dispatch_dtype": "float8_e4m3fn"}, "dispatch_dtype='float8_e4m3fn'"),
    ],
)
def test_the_host_moves_float32_only(change, said):
    with pytest.raises(NotImplementedError, match=said) as raised:
        check(dataclasses.replace(CPU, **change))
    assert "use row_dtype='float32', dispatch_dtype=''" in str(raised.value)


@given(st.sampled_from(["float32", "float16"]))
def test_a_gpu_moves_bfloat16_only(row_dtype):
    with on_h100(), pytest.raises(NotImplementedError, match=f"row_dtype='{row_dtype}'") as raised:
        check(dataclasses.replace(CPU, row_dtype=row_dtype))
    assert "use row_dtype='bfloat16'" in str(raised.value)


@given(st.integers(1, 8192))
def test_a_gpu_takes_whole_groups_of_channels(hidden):
    layout = a_layout(hidden=hidden)
    with on_h100():
        if hidden % 64 == 0:
            return check(layout, hidden=hidden)
        with pytest.raises(NotImplementedError, match=f"{hidden} channels: .* multiple of 64; pad"):
            check(layout, hidden=hidden)


@given(st.integers(1, 64), st.integers(1, 9))
def test_a_gpu_takes_batches_of_whole_groups_of_choices(tokens, choices):
    layout = a_layout(tokens=tokens, choices=choices)
    with on_h100():
        if tokens * choices % 4 == 0:
            return check(layout, tokens, 128, choices)
        said = f"{tokens} tokens x {choices} choices: .* multiple of 4; use batches and a window"
        with pytest.raises(NotImplementedError, match=said):
            check(layout, tokens, 128, choices)


def test_the_window_too_holds_whole_groups_of_choices():
    with on_h100(), pytest.raises(NotImplementedError, match="5 tokens x 2 choices"):
        check(a_layout(tokens=5, choices=2), 2, 128, 2)


def test_a_pipeline_that_would_wait_for_itself_is_refused():
    with pytest.raises(ValueError, match=r"self\.stages=3 must be at least 4"):
        GemmConfig(stages=3)
    with pytest.raises(ValueError, match=r"self\.tile_rows=96 must be 64 or 128"):
        GemmConfig(tile_rows=96)


def lower_gemm(width=128, hidden=128, dtype=jnp.bfloat16, config=None):
    run = lambda *given: inspect.unwrap(expert_gemm)(*given, layer=0, config=config)
    rows, slots = like((1, 8, hidden), jnp.bfloat16), like((1, 8, 4), np.int32)
    return lowered(run, rows, slots, like((4, 1, 3, width, hidden), dtype))


@pytest.mark.parametrize(("width", "hidden"), [(96, 128), (128, 96), (2880, 100)])
def test_experts_of_other_widths_are_refused_with_the_way_out(width, hidden):
    said = f"F={width} over D={hidden} channels: .* multiples of 64; pad the experts with zeros"
    with pytest.raises(NotImplementedError, match=said):
        lower_gemm(width, hidden)
    with pytest.raises(NotImplementedError, match=said):
        config_for(64, 8, width, hidden)


def test_a_bank_of_another_dtype_is_refused_on_a_gpu():
    with pytest.raises(NotImplementedError, match=r"a bank of float32: .* bfloat16"):
        lower_gemm(dtype=jnp.float32)


def test_a_chosen_configuration_lists_its_own_tiles():
    assert "mosaic_gpu" in lower_gemm(config=GemmConfig(tile_rows=128, stages=4, down_stages=3))
