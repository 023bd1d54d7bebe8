"""Hugging Face directories as an ExpertStore: any expert alone, a few blocks at a time.

Ranks serve from the directory, each reading the experts of its slots. Nothing is written to it.
"""

import collections.abc
import functools
import itertools
import math
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np

from eep_jax.config import ModelConfig
from eep_jax.errors import CheckpointError
from eep_jax.heap.copies import copy_values, empty_aligned
from eep_jax.models.families import registry
from eep_jax.models.families.quantized import (
    BFLOAT16,
    MXFP4_BLOCK,
    from_fp8,
    from_mxfp4,
    quantization_of,
    scales_shape,
)
from eep_jax.models.families.tensors import ExpertPart, Stored, as_stored, transposed
from eep_jax.models.weights import expert_name
from eep_jax.storage.block_loader import Job, load_arrays
from eep_jax.storage.blocks import (
    ArrayTarget,
    Block,
    ComputedBlock,
    Files,
    ScratchBuffer,
    Target,
    TransposedBlock,
    Worker,
    WriteGate,
    plain_blocks,
)
from eep_jax.storage.checkpoint import MANIFEST, require_same_model
from eep_jax.storage.digests import digest
from eep_jax.storage.expert_store import ExpertStore, Lazy
from eep_jax.storage.safetensors_files import DTYPES, SafetensorsFiles, TensorSpan

NARROW = ("F8_E4M3", "U8")  # stored dtypes of quantized weights
_ENDS = ("", "_blocks", "_scales", "_scale_inv")  # suffixes of keys that belong together


def is_hugging_face(directory) -> bool:
    """Whether it holds config.json and no manifest.json of our own."""
    root = pathlib.Path(directory)
    return (root / registry.CONFIG).exists() and not (root / MANIFEST).exists()


class HuggingFaceCheckpoint(ExpertStore):
    """An ExpertStore over config.json and safetensors files, quantized ones included.

    Opening it reads config.json and the headers of the files.

    Args:
        directory: A directory as `save_pretrained` writes it.
        dtype: The dtype of experts; "" as stored, or bfloat16 if quantized.

    Raises:
        CheckpointError: The model is not supported, or a tensor is missing or of another shape;
            the message names file, key and shapes.
    """

    def __init__(self, directory, dtype: str = ""):
        self.root = pathlib.Path(directory).absolute()
        values, path = registry.read_config_json(self.root), str(self.root / registry.CONFIG)
        self.model: ModelConfig = registry.read_model(self.root)
        self._family = registry.family_of(values, path)
        self._quantization = quantization_of(values, path)
        self._files = SafetensorsFiles(self.root)
        self._dense = self._family.dense(self.model)
        self._check_all()
        self.dtype = np.dtype(dtype) if dtype else self._stored_dtype()
        experts = {expert_name(e): e for e in range(self.model.experts)}
        self.manifest = {
            "dtype": self.dtype.name,
            "facts": {},
            "experts": Lazy(experts, functools.cache(lambda name: self._digest(experts[name]))),
        }

    def require_model(self, model: ModelConfig) -> None:
        """Raises CheckpointError unless the models are equal but for their names."""
        require_same_model(self.root, self.model, model, but=("name",))

    def content_name(self, expert: int) -> str:
        """See ExpertStore: identifies the files by size and time, without reading them."""
        stats = [(str(path), path.stat()) for path in self.source_files()]
        files = [(path, found.st_size, found.st_mtime_ns) for path, found in stats]
        return f"expert {expert} in {self.dtype} of {files}"

    def source_files(self) -> list[pathlib.Path]:
        """config.json and the files that hold weights."""
        return [self.root / registry.CONFIG, *self._files.paths]

    def read_dense(self) -> collections.abc.Mapping[str, np.ndarray]:
        """All weights outside the experts, by name, each read whenever it is looked up."""
        return Lazy(self._dense, lambda name: self._read(self._dense[name]))

    def read_experts(self, experts: list[int]) -> dict[int, np.ndarray]:
        """See ExpertStore."""
        found = {e: empty_aligned(self.model.expert_shape, self.dtype) for e in experts}
        load_arrays([self.expert_job(e, ArrayTarget(out), True) for e, out in found.items()])
        return found

    def expert_job(self, expert: int, target: Target, in_place: bool) -> Job:
        """See ExpertStore; never None."""
        self._require_experts([expert])
        blocks = functools.partial(self._expert_blocks, expert)
        return Job(f"expert {expert} of {self.root}", blocks, target, in_place=in_place)

    def spans(self, expert: int) -> list[tuple[pathlib.Path, int, int]]:
        """(file, first byte, last byte + 1) of every range that is read for one expert."""
        parts = (part.stored for part in self._family.expert(self.model, expert))
        tensors = {(stored.key, stored.index) for stored in parts}
        return self._spans((key, index) for key, index in tensors)

    def dense_spans(self) -> list[tuple[pathlib.Path, int, int]]:
        """Likewise for all weights outside the experts."""
        return self._spans({(stored.key, None) for stored in self._dense.values()})

    def _spans(self, tensors) -> list[tuple[pathlib.Path, int, int]]:
        found = (self._files.find(key + end, index) for key, index in tensors for end in _ENDS)
        return sorted((p.path, p.start, p.start + p.nbytes) for p in found if p is not None)

    def _digest(self, expert: int) -> str:
        """The files store no digests, so the expert is read."""
        return digest(self.read_experts([expert])[expert])

    def _expert_blocks(self, expert: int) -> Iterator[Block]:
        layers, matrices, *size = self.model.expert_shape
        parts = self._family.expert(self.model, expert)
        by_matrix = itertools.groupby(parts, lambda p: (p.layer, p.matrix))
        grouped = {index: list(found) for index, found in by_matrix}
        if len(grouped) != layers * matrices:
            raise CheckpointError(
                f"expert {expert} has {len(grouped)} of {layers * matrices} parts"
            )
        for (layer, matrix), found in grouped.items():
            yield from self._matrix_blocks((layer * matrices + matrix) * math.prod(size), found)

    def _matrix_blocks(self, at: int, parts: list[ExpertPart]) -> Iterable[Block]:
        stored = parts[0].stored
        if len(parts) == 1 and not self._is_quantized(stored):
            span = self._files.span(stored.key, stored.shape, stored.index)
            if stored.form is as_stored:
                return plain_blocks(at, span.count, span.dtype, span.path, span.start)
            if stored.form is transposed:
                return [TransposedBlock(at, span.shape, span.dtype, span.path, span.start)]
        return [ComputedBlock(at, functools.partial(self._matrix, parts))]

    def _matrix(self, parts: list[ExpertPart], files: Files, scratch: ScratchBuffer) -> np.ndarray:
        """One matrix `[F D]` of an expert, with its bias in the rows below."""
        shape, width = self.model.expert_shape[2:], self.model.expert_hidden
        out = (
            scratch.take(shape[0] * shape[1] * self.dtype.itemsize).view(self.dtype).reshape(shape)
        )
        for part in parts:
            values = part.stored.form(self._tensor(part.stored, files, scratch))
            if part.bias:
                below = out[width:].reshape(-1)
                below[: values.size], below[values.size :] = values, 0
            else:
                copy_values(out[:width], values)
        return out

    def _read(self, stored: Stored) -> np.ndarray:
        """One weight outside the experts."""
        worker = Worker(Files(), ScratchBuffer(), WriteGate())
        try:
            if self._is_quantized(stored) or stored.form not in (as_stored, transposed):
                values = stored.form(self._tensor(stored, worker.files, worker.scratch))
                out = empty_aligned(values.shape, values.dtype)
                copy_values(out, values)
                return out
            span = self._files.span(stored.key, stored.shape)
            if stored.form is as_stored:
                out = empty_aligned(span.shape, span.dtype)
                worker.files.read(span.path, span.start, out)
                return out
            out = empty_aligned(span.shape[::-1], span.dtype)
            block = TransposedBlock(0, span.shape, span.dtype, span.path, span.start)
            block.load_into(worker, ArrayTarget(out), in_place=True, checked=False)
            return out
        finally:
            worker.files.close()

    def _tensor(self, stored: Stored, files: Files, scratch: ScratchBuffer) -> np.ndarray:
        """The tensor, or its part, dequantized; in `scratch` unless it is quantized."""
        for reader in (self._mxfp4, self._fp8):
            if (found := reader(stored, files, scratch)) is not None:
                return found
        return _values(self._files.span(stored.key, stored.shape, stored.index), files, scratch)

    def _fp8(self, stored: Stored, files: Files, scratch: ScratchBuffer) -> np.ndarray | None:
        key = f"{stored.key}_scale_inv"
        if self._quantization.method != "fp8" or key not in self._files:
            return None
        block = self._quantization.block
        scales = self._files.span(key, scales_shape(stored.shape, block))
        weight = self._files.span(stored.key, stored.shape)
        return from_fp8(_values(weight, files, scratch), _values(scales, files, scratch), block)

    def _mxfp4(self, stored: Stored, files: Files, scratch: ScratchBuffer) -> np.ndarray | None:
        key = f"{stored.key}_blocks"
        if self._quantization.method != "mxfp4" or key not in self._files:
            return None
        # The file has the last two axes transposed, so that blocks lie along the inputs.
        experts, inputs, outputs = stored.shape
        shape = (experts, outputs, inputs // MXFP4_BLOCK)
        blocks = self._files.span(key, (*shape, MXFP4_BLOCK // 2), stored.index)
        scales = self._files.span(f"{stored.key}_scales", shape, stored.index)
        return from_mxfp4(_values(blocks, files, scratch), _values(scales, files, scratch)).T

    def _is_quantized(self, stored: Stored) -> bool:
        ends = ("blocks", "scale_inv") if self._quantization.method else ()
        return any(f"{stored.key}_{end}" in self._files for end in ends)

    def _check_all(self) -> None:
        """Checks that every tensor exists in its shape; reads headers only."""
        first = self._family.expert(self.model, 0)
        fused = all(part.stored.index is not None for part in first)
        experts = (
            self._family.expert(self.model, e) for e in range(1 if fused else self.model.experts)
        )
        parts = (part.stored for part in itertools.chain.from_iterable(experts))
        for stored in itertools.chain(self._dense.values(), parts):
            self._check(stored)

    def _check(self, stored: Stored) -> None:
        if self._is_quantized(stored):
            return
        found = self._files.span(stored.key, stored.shape)
        if found.dtype in [DTYPES[name] for name in NARROW]:
            raise CheckpointError(f"{found.path}: {stored.key} is {found.dtype} without scales")

    def _stored_dtype(self) -> np.dtype:
        stored = next(iter(self._family.expert(self.model, 0))).stored
        if self._is_quantized(stored):
            return BFLOAT16
        return self._files.span(stored.key, stored.shape).dtype


def _values(span: TensorSpan, files: Files, scratch: ScratchBuffer) -> np.ndarray:
    data = scratch.take(span.nbytes)
    files.read(span.path, span.start, data)
    return data.view(span.dtype).reshape(span.shape)
