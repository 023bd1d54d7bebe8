"""Launch configurations of the expert GEMM: each supported shape has one that fits."""

import functools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.combine.config import CombineConfig
from pallas_kernels.dispatch.config import config_for as dispatch_config_for
from pallas_kernels.expert_gemm import mosaic_gpu
from pallas_kernels.expert_gemm.config import GROUP_ROWS, config_for
from pallas_kernels.grouping import group_rows, tile_rows_for
from pallas_kernels.handover import InArray
from pallas_kernels.sizes import WIDTH_MULTIPLE

SHARED_BYTES_MAX = 227 * 1024  # of a block on Hopper
BARRIER_BYTES = 8
REGISTERS_MAX = 65536  # of a multiprocessor
widths = st.integers(1, 128).map(lambda n: n * WIDTH_MULTIPLE)
tiles = st.sampled_from([64, 128])


SLOTS, SHAPE = 8, (1, 8, 4)


@functools.cache
def lists_of(tile_rows: int):
    """Shapes of the lists for a few rows."""
    run = lambda slots: group_rows(slots, SLOTS, tile_rows)
    return jax.eval_shape(run, jax.ShapeDtypeStruct(SHAPE, np.int32))


def launches(config, width: int, hidden: int) -> dict[str, list]:
    """Scratch of both kernels for experts of this shape."""
    found = {}

    def launch(work, body, name, out, scratch, operands):
        found[name] = scratch
        return out

    rows = jax.ShapeDtypeStruct((*SHAPE[:2], hidden), jnp.bfloat16)
    bank = jax.ShapeDtypeStruct((SLOTS, 1, 3, width, hidden), jnp.bfloat16)
    source, lists = InArray(rows, SHAPE[2]), lists_of(config.tile_rows)
    with mock.patch.object(mosaic_gpu.Work, "launch", launch):
        mosaic_gpu.expert_gemm_mosaic(source, SHAPE, lists, mosaic_gpu.Experts(bank, 0), config)
    assert set(found) == {"expert_gate_up", "expert_down"}
    return found


def shared_bytes(scratch: list) -> int:
    """Arrays in shared memory, each at a multiple of 1024 bytes as swizzles need, and barriers."""
    total = 0
    for part in scratch:
        if isinstance(part, plgpu.Barrier):
            total += BARRIER_BYTES * int(np.prod(part.num_barriers))
        else:
            total += -(-math.prod(part.shape) * jnp.dtype(part.dtype).itemsize // 1024) * 1024
    return total


@given(tiles, st.integers(1, 512), widths, widths)
def test_every_shape_has_a_launch_that_divides_it_and_fits(tile_rows, slots, width, hidden):
    config = config_for(tile_rows, slots, width, hidden)
    assert config.tile_rows == tile_rows == config.groups * GROUP_ROWS
    assert width % config.tile_columns == 0 and config.tile_columns % mosaic_gpu.DEPTH == 0
    assert hidden % config.down_columns == 0 and config.down_columns % mosaic_gpu.DEPTH == 0
    # A stage is handed over LAG stages late and freed one later; fewer stages would deadlock.
    assert config.stages >= mosaic_gpu.LAG + 2 and config.down_stages >= 2
    for name, scratch in launches(config, width, hidden).items():
        needed = shared_bytes(scratch)
        assert needed <= SHARED_BYTES_MAX, f"{name} of {config} needs {needed} bytes"


@pytest.mark.parametrize("groups", [1, 2])
def test_the_registers_of_all_warpgroups_fit_a_multiprocessor(groups):
    of_one = mosaic_gpu.MULTIPLY_REGISTERS[groups] * groups + mosaic_gpu.LOAD_REGISTERS
    assert of_one * 128 <= REGISTERS_MAX
    assert mosaic_gpu.MULTIPLY_REGISTERS[groups] % 8 == mosaic_gpu.LOAD_REGISTERS % 8 == 0


@given(st.floats(0, 1e6))
def test_tiles_have_one_warpgroup_for_few_rows_and_two_for_many(rows_per_slot):
    assert tile_rows_for(rows_per_slot) == (64 if rows_per_slot <= 40 else 128)


@given(st.integers(1, 4096), st.integers(1, 16), st.integers(1, 512))
def test_dispatch_lists_the_tiles_that_the_gemm_takes(tokens, choices, slots):
    config = dispatch_config_for(tokens, choices, slots)
    assert config.tile_rows == tile_rows_for(tokens * choices / slots)
    assert config.blocks >= 1 and CombineConfig().send_blocks >= 1 <= CombineConfig().sum_blocks
    assert config_for(config.tile_rows, slots, 128, 128).tile_rows == config.tile_rows
