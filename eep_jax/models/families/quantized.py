"""Conversion to bfloat16 of weights that checkpoints store in 8 or 4 bits."""

import dataclasses

import ml_dtypes
import numpy as np

from eep_jax.errors import CheckpointError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MXFP4_BLOCK = 32  # values that share one scale
# E2M1: sign, two bits of exponent, one of mantissa.
MXFP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
MXFP4_VALUES = np.concatenate([MXFP4_VALUES, -MXFP4_VALUES])


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Storage of a checkpoint's large matrices: "" for unquantized, `fp8` or `mxfp4`."""

    method: str = ""
    block: tuple[int, int] = (128, 128)  # for fp8: the part of a matrix that shares one scale


def quantization_of(values: dict, path: str) -> Quantization:
    """The quantization in config.json. Raises CheckpointError for an unsupported method."""
    found = values.get("quantization_config")
    if not found:
        return Quantization()
    method = found.get("quant_method")
    if method == "mxfp4":
        return Quantization("mxfp4")
    if method == "fp8" and found.get("weight_block_size"):
        return Quantization("fp8", tuple(found["weight_block_size"]))
    raise CheckpointError(
        f"{path}: quantization_config={found} is not supported, only quant_method 'mxfp4', and "
        "'fp8' with a weight_block_size; use an unquantized checkpoint"
    )


def from_fp8(weight: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """bfloat16 `[N M]`: each block of float8 values times its float32 scale (DeepSeek-V3)."""
    rows, columns = weight.shape
    wide = np.repeat(scales.astype(np.float32), block[1], axis=1)[:, :columns]
    out = np.empty(weight.shape, BFLOAT16)
    for number, start in enumerate(range(0, rows, block[0])):
        part = weight[start : start + block[0]].astype(np.float32)
        out[start : start + block[0]] = part * wide[number]
    return out


def scales_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    return tuple(-(-size // part) for size, part in zip(shape, block, strict=True))


def from_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """bfloat16 `[N M]` of blocks `[N M/32 16]` and scales `[N M/32]`, both uint8.

    A byte holds two values, the low half first; a scale s means `2 ** (s - 127)` (OCP MX 1.0).
    bfloat16 holds each product exactly.
    """
    halves = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, MXFP4_BLOCK)
    factors = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
    values = MXFP4_VALUES[halves] * factors[..., None]
    return values.reshape(scales.shape[0], -1).astype(BFLOAT16)
