"""Rows in fp8: e4m3 values with one float32 scale per 128 channels, stored behind the values."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from pallas_kernels.sizes import SCALE_CHANNELS
from pallas_kernels.window import round_up

E4M3_MAX = 448.0
SMALLEST_PEAK = 1e-12  # so that the scale of zeros is not zero


def pack_rows(x: Float[Array | np.ndarray, "*T D"]) -> UInt8[Array, "*T B"]:
    """`x ~ value * scale` with scale = max |x| / 448 over each 128 channels.

    B is D bytes of values, then D / 128 little-endian float32 scales, padded to a multiple of 16.
    """
    *lead, hidden = x.shape
    blocks = x.astype(jnp.float32).reshape(*lead, hidden // SCALE_CHANNELS, SCALE_CHANNELS)
    scale = jnp.maximum(jnp.max(jnp.abs(blocks), axis=-1), SMALLEST_PEAK) / E4M3_MAX
    scaled = jnp.clip(blocks / scale[..., None], -E4M3_MAX, E4M3_MAX)
    values = scaled.astype(jnp.float8_e4m3fn).reshape(*lead, hidden)
    as_bytes = lambda a: jax.lax.bitcast_convert_type(a, jnp.uint8).reshape(*lead, -1)
    packed = jnp.concatenate([as_bytes(values), as_bytes(scale)], axis=-1)
    missing = round_up(packed.shape[-1], 16) - packed.shape[-1]
    return jnp.pad(packed, [(0, 0)] * len(lead) + [(0, missing)])


def unpack_rows(
    packed: UInt8[Array | np.ndarray, "*T B"], hidden: int, dtype: DTypeLike
) -> Float[Array, "*T D"]:
    """The inverse of `pack_rows`, up to e4m3's rounding (relative 2**-4 of each value)."""
    *lead, _ = packed.shape
    values = jax.lax.bitcast_convert_type(packed[..., :hidden], jnp.float8_e4m3fn)
    count = hidden // SCALE_CHANNELS
    scale_bytes = packed[..., hidden : hidden + 4 * count].reshape(*lead, count, 4)
    scale = jax.lax.bitcast_convert_type(scale_bytes, jnp.float32)
    blocks = values.astype(jnp.float32).reshape(*lead, count, SCALE_CHANNELS)
    return (blocks * scale[..., None]).reshape(*lead, hidden).astype(dtype)
