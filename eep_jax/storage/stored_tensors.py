"""Tensors of a Hugging Face directory as values: plain, or dequantized to bfloat16."""

from collections.abc import Callable

import numpy as np

from eep_jax.errors import CheckpointError
from eep_jax.models.families.quantized import (
    MXFP4_BLOCK,
    Quantization,
    from_fp8,
    from_mxfp4,
    from_packed,
    scales_shape,
)
from eep_jax.models.families.tensors import Stored
from eep_jax.storage.blocks import Files, ScratchBuffer
from eep_jax.storage.safetensors_files import DTYPES, SafetensorsFiles, TensorSpan

NARROW = ("F8_E4M3", "U8", "I8", "I32")  # stored dtypes of quantized weights
# For each method the suffix of keys that only quantized tensors have.
_MARKS = {"mxfp4": "_blocks", "fp8": "_scale_inv", "packed": "_packed", "scaled": "_scale"}
# All suffixes of keys that belong together.
ENDS = ("", "_blocks", "_scales", "_scale_inv", "_packed", "_scale")


class StoredTensors:
    """Reader of tensors, or of their parts, in the files of one directory.

    Args:
        files: The directory's files.
        quantization: How config.json says that large matrices are stored.
    """

    def __init__(self, files: SafetensorsFiles, quantization: Quantization):
        self._files, self._quantization = files, quantization

    def is_quantized(self, stored: Stored) -> bool:
        method = self._quantization.method
        return bool(method) and f"{stored.key}{_MARKS[method]}" in self._files

    def span(self, stored: Stored) -> TensorSpan:
        """The bytes of an unquantized tensor, or of its part. Raises CheckpointError as `check`."""
        span = self._files.span(stored.key, stored.shape, stored.index)
        return span.part(*stored.rows) if stored.rows else span

    def check(self, stored: Stored) -> None:
        """Reads headers only. Raises CheckpointError for a missing tensor or another shape."""
        if self.is_quantized(stored):
            self._spans(stored)
            return
        found = self.span(stored)
        if found.dtype in [DTYPES[name] for name in NARROW]:
            raise CheckpointError(f"{found.path}: {stored.key} is {found.dtype} without scales")

    def read(self, stored: Stored, files: Files, scratch: ScratchBuffer) -> np.ndarray:
        """The values of a tensor, or of its part; in `scratch` unless it is quantized."""
        if not self.is_quantized(stored):
            return _values(self.span(stored), files, scratch)
        low, high = (_values(span, files, scratch) for span in self._spans(stored))
        values = self._widen(stored.shape[-1])(low, high)
        return values[slice(*stored.rows)] if stored.rows else values

    def _widen(self, columns: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        """Function of stored values and scales."""
        how = self._quantization
        if how.method == "mxfp4":
            return lambda blocks, scales: from_mxfp4(blocks, scales).T
        if how.method == "packed":
            return lambda low, scales: from_packed(low, scales, how.bits, columns, how.group)
        return lambda low, scales: from_fp8(low, scales, how.block)

    def _spans(self, stored: Stored) -> tuple[TensorSpan, TensorSpan]:
        """Bytes of values and of scales."""
        how, key, shape = self._quantization, stored.key, stored.shape
        find = lambda end, shape: self._files.span(f"{key}{end}", shape, stored.index)
        if how.method == "mxfp4":
            # The file has the last two axes transposed, so that blocks lie along the inputs.
            experts, inputs, outputs = shape
            scales = (experts, outputs, inputs // MXFP4_BLOCK)
            return find("_blocks", (*scales, MXFP4_BLOCK // 2)), find("_scales", scales)
        if how.method == "packed":
            *rows, columns = shape
            words = -(-columns * how.bits // 32)
            groups = scales_shape(shape, (1, how.group))
            return find("_packed", (*rows, words)), find("_scale", groups)
        scales = scales_shape(shape, how.block)
        if how.method == "fp8":
            return find("", shape), find("_scale_inv", scales)
        return find("", shape), self._scale_span(stored, scales)

    def _scale_span(self, stored: Stored, shape: tuple[int, ...]) -> TensorSpan:
        """One scale of a whole matrix has no axes, or one of length 1."""
        key = f"{stored.key}_scale"
        if self._quantization.block == (0, 0):
            found = self._files.find(key, None)
            if found is not None and found.count == 1:
                return found.reshaped(shape)
        return self._files.span(key, shape, stored.index)


def _values(span: TensorSpan, files: Files, scratch: ScratchBuffer) -> np.ndarray:
    data = scratch.take(span.nbytes)
    files.read(span.path, span.start, data)
    return data.view(span.dtype).reshape(span.shape)
