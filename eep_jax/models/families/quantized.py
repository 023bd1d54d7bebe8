"""Conversion to bfloat16 of weights that checkpoints store in 8 or 4 bits."""

import dataclasses
import functools

import ml_dtypes
import numpy as np

from eep_jax.errors import CheckpointError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_ROWS = 16  # that are converted at a time
# What decides how compressed-tensors stores a weight, and orders of columns that move none.
_SCHEME = ("type", "num_bits", "strategy", "group_size", "block_structure", "symmetric", "actorder")
_NO_ORDER = (None, False, "static", "weight")
MXFP4_BLOCK = 32  # values that share one scale
# E2M1: sign, two bits of exponent, one of mantissa.
MXFP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
MXFP4_VALUES = np.concatenate([MXFP4_VALUES, -MXFP4_VALUES])


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Storage of a checkpoint's large matrices: "" for unquantized, `fp8`, `mxfp4`, and of
    compressed-tensors `packed` integers and `scaled` float8.
    """

    method: str = ""
    block: tuple[int, int] = (128, 128)  # of fp8, scaled: rows and columns of one scale; 0: all
    bits: int = 4  # of packed
    group: int = 0  # of packed: columns of a row that share one scale; 0: all


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
    if method == "compressed-tensors":
        return _compressed(found, path)
    raise CheckpointError(
        f"{path}: quantization_config={found} is not supported, only quant_method 'mxfp4', 'fp8' "
        "with a weight_block_size, and 'compressed-tensors'; use an unquantized checkpoint"
    )


def _compressed(found: dict, path: str) -> Quantization:
    """Symmetric integers of 4 or 8 bits, packed, or float8; all matrices alike."""
    groups = [group.get("weights") or {} for group in (found.get("config_groups") or {}).values()]
    schemes = [{key: group.get(key) for key in _SCHEME} for group in groups]
    scheme = schemes[0] if schemes and all(other == schemes[0] for other in schemes) else {}
    known = scheme and scheme["symmetric"] in (None, True) and scheme["actorder"] in _NO_ORDER
    packed, bits = found.get("format") == "pack-quantized", scheme.get("num_bits")
    kind, strategy = (scheme.get("type"), packed, bits), scheme.get("strategy")
    if known and kind in (("int", True, 4), ("int", True, 8)):
        group = {"channel": 0, "group": scheme["group_size"]}.get(strategy)
        if isinstance(group, int) and group >= 0:
            return Quantization("packed", bits=bits, group=group)
    if known and kind == ("float", False, 8):
        block = {"channel": (1, 0), "tensor": (0, 0), "block": scheme["block_structure"]}
        if block.get(strategy):
            return Quantization("scaled", tuple(block[strategy]))
    raise CheckpointError(
        f"{path}: quantization_config of compressed-tensors, format={found.get('format')!r} and "
        f"weights={groups} is not supported, only symmetric integers of 4 or 8 bits per group or "
        "channel in format 'pack-quantized', and float8 per channel, tensor or block; use an "
        "unquantized checkpoint"
    )


def from_fp8(weight: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """bfloat16 `[N M]`: each block of float8 values times its scale (DeepSeek-V3).

    A block of 0 rows or columns has all of them.
    """
    rows, columns = weight.shape
    high, broad = block[0] or rows, block[1] or columns
    wide = np.repeat(scales.astype(np.float32), broad, axis=1)[:, :columns]
    if high == 1:
        return (weight.astype(np.float32) * wide).astype(BFLOAT16)
    out = np.empty(weight.shape, BFLOAT16)
    for number, start in enumerate(range(0, rows, high)):
        part = weight[start : start + high].astype(np.float32)
        out[start : start + high] = part * wide[number]
    return out


def scales_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of a matrix `[N M]`, or of a stack of them."""
    *stack, rows, columns = shape
    parts = zip((rows, columns), block, strict=True)
    return (*stack, *(-(-size // part) if part else 1 for size, part in parts))


def from_packed(
    packed: np.ndarray, scales: np.ndarray, bits: int, columns: int, group: int
) -> np.ndarray:
    """bfloat16 `[N M]` of int32 words `[N W]`, each of `32 / bits` values, the lowest first.

    A value v means `(v - 2 ** (bits - 1)) * scale`, with a scale per `group` columns of a row.

    >>> from_packed(np.array([[0x0A98]], np.int32), np.ones((1, 1), np.float32), 4, 3, 3)
    array([[0, 1, 2]], dtype=bfloat16)
    """
    group, out = group or columns, np.empty((len(packed), columns), BFLOAT16)
    table, narrow = _values_of_bytes(bits), packed.view(np.uint8)
    # A few rows at a time stay in a core's cache.
    for start in range(0, len(packed), _ROWS):
        rows = slice(start, start + _ROWS)
        values = table[narrow[rows]].reshape(len(narrow[rows]), -1)[:, :columns]
        wide = np.repeat(scales[rows].astype(np.float32), group, axis=1)[:, :columns]
        out[rows] = values * wide
    return out


@functools.cache
def _values_of_bytes(bits: int) -> np.ndarray:
    """float32 `[256, 8 / bits]`: the values that each byte holds, the lowest first."""
    shifts = np.arange(0, 8, bits)
    return (((np.arange(256)[:, None] >> shifts) & (2**bits - 1)) - 2 ** (bits - 1)).astype(
        np.float32
    )


def from_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """bfloat16 `[N M]` of blocks `[N M/32 16]` and scales `[N M/32]`, both uint8.

    A byte holds two values, the low half first; a scale s means `2 ** (s - 127)` (OCP MX 1.0).
    bfloat16 holds each product exactly.
    """
    halves = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, MXFP4_BLOCK)
    factors = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
    values = MXFP4_VALUES[halves] * factors[..., None]
    return values.reshape(scales.shape[0], -1).astype(BFLOAT16)
