"""Hugging Face directories as an ExpertStore: any expert alone, a few blocks at a time.

Ranks serve from the directory, each reading the experts of its slots. Its files store no digests;
`learned` are those of the first load, and what they do not fit is not used.
"""

import collections.abc
import dataclasses
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
from eep_jax.models.families.keys import find_keys
from eep_jax.models.families.quantized import BFLOAT16, quantization_of
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
from eep_jax.storage.learned_digests import LearnedDigests, Span, StoredDigestBlock, digest_of
from eep_jax.storage.safetensors_files import SafetensorsFiles
from eep_jax.storage.stored_tensors import ENDS, StoredTensors


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
        learned: Digests that every weight is compared with when it is read; None compares nothing.

    Raises:
        CheckpointError: The model is not supported, or a tensor is missing or of another shape;
            the message names file, key and shapes.
    """

    def __init__(self, directory, dtype: str = "", learned: LearnedDigests | None = None):
        self._learned = learned
        self.root = pathlib.Path(directory).absolute()
        values, path = registry.read_config_json(self.root), str(self.root / registry.CONFIG)
        self.model: ModelConfig = registry.read_model(self.root)
        self._family = registry.family_of(values, path)
        self._files = SafetensorsFiles(self.root)
        self._tensors = StoredTensors(self._files, quantization_of(values, path))
        dense = self._family.dense(self.model)
        self._keys = find_keys(self._family, self.model, dense.values(), self._files.shape)
        self._dense = {name: self._keys.of(stored) for name, stored in dense.items()}
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
        return Lazy(self._dense, self._read_dense)

    def read_experts(self, experts: list[int]) -> dict[int, np.ndarray]:
        """See ExpertStore."""
        found = {e: empty_aligned(self.model.expert_shape, self.dtype) for e in experts}
        load_arrays([self.expert_job(e, ArrayTarget(out), True) for e, out in found.items()])
        return found

    def expert_job(self, expert: int, target: Target, in_place: bool) -> Job:
        """See ExpertStore; never None."""
        self._require_experts([expert])
        blocks, compare = functools.partial(self._expert_blocks, expert), None
        if self._learned is not None:
            compare = functools.partial(self._compare, expert_name(expert), self.spans(expert))
        name = f"expert {expert} of {self.root}"
        return Job(name, blocks, target, in_place=in_place, compare=compare)

    def spans(self, expert: int) -> list[tuple[pathlib.Path, int, int]]:
        """(file, first byte, last byte + 1) of every range that is read for one expert."""
        return self._parts_spans(self._parts(expert))

    def dense_spans(self) -> list[tuple[pathlib.Path, int, int]]:
        """Likewise for all weights outside the experts."""
        return self._spans({(stored.key, None) for stored in self._dense.values()})

    def _compare(self, name: str, spans: list[Span], found: str) -> bool:
        return self._learned.compare(name, found, (path for path, _, _ in spans))

    def _read_dense(self, name: str) -> np.ndarray:
        stored = self._dense[name]
        if self._learned is not None:
            spans = self._spans({(stored.key, None)})
            self._compare(name, spans, digest_of(spans))
        return self._read(stored)

    def _spans(self, tensors) -> list[tuple[pathlib.Path, int, int]]:
        found = (self._files.find(key + end, index) for key, index in tensors for end in ENDS)
        return sorted((p.path, p.start, p.start + p.nbytes) for p in found if p is not None)

    def _digest(self, expert: int) -> str:
        """The files store no digests, so the expert is read."""
        return digest(self.read_experts([expert])[expert])

    def _expert_blocks(self, expert: int) -> Iterator[Block]:
        layers, matrices, *size = self.model.expert_shape
        by_matrix = itertools.groupby(self._parts(expert), lambda p: (p.layer, p.matrix))
        grouped = {index: list(found) for index, found in by_matrix}
        if len(grouped) != layers * matrices:
            raise CheckpointError(
                f"expert {expert} has {len(grouped)} of {layers * matrices} parts"
            )
        for (layer, matrix), found in grouped.items():
            yield from self._matrix_blocks((layer * matrices + matrix) * math.prod(size), found)

    def _matrix_blocks(self, at: int, parts: list[ExpertPart]) -> Iterable[Block]:
        stored = parts[0].stored
        if len(parts) == 1 and not self._tensors.is_quantized(stored):
            span = self._tensors.span(stored)
            if stored.form is as_stored:
                return plain_blocks(at, span.count, span.dtype, span.path, span.start)
            if stored.form is transposed:
                block = TransposedBlock(at, span.shape, span.dtype, span.path, span.start)
                return [StoredDigestBlock(block, self._parts_spans(parts))]
        block = ComputedBlock(at, functools.partial(self._matrix, parts))
        return [StoredDigestBlock(block, self._parts_spans(parts))]

    def _parts_spans(self, parts: Iterable[ExpertPart]) -> list[Span]:
        stored = (part.stored for part in parts)
        return self._spans({(found.key, found.index) for found in stored})

    def _matrix(self, parts: list[ExpertPart], files: Files, scratch: ScratchBuffer) -> np.ndarray:
        """One matrix `[F D]` of an expert, with its bias in the rows below."""
        shape, width = self.model.expert_shape[2:], self.model.expert_hidden
        out = (
            scratch.take(shape[0] * shape[1] * self.dtype.itemsize).view(self.dtype).reshape(shape)
        )
        for part in parts:
            values = part.stored.form(self._tensors.read(part.stored, files, scratch))
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
            if self._tensors.is_quantized(stored) or stored.form not in (as_stored, transposed):
                values = stored.form(self._tensors.read(stored, worker.files, worker.scratch))
                out = empty_aligned(values.shape, values.dtype)
                copy_values(out, values)
                return out
            span = self._tensors.span(stored)
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

    def _parts(self, expert: int) -> Iterator[ExpertPart]:
        fused = self._keys.fused
        read = self._family.expert if fused is None else self._family.fused[fused]
        for part in read(self.model, expert):
            yield dataclasses.replace(part, stored=self._keys.of(part.stored))

    def _check_all(self) -> None:
        """Checks that every tensor exists in its shape; reads headers only."""
        fused = all(part.stored.index is not None for part in self._parts(0))
        experts = (self._parts(e) for e in range(1 if fused else self.model.experts))
        parts = (part.stored for part in itertools.chain.from_iterable(experts))
        for stored in itertools.chain(self._dense.values(), parts):
            self._tensors.check(stored)

    def _stored_dtype(self) -> np.dtype:
        stored = next(self._parts(0)).stored
        return BFLOAT16 if self._tensors.is_quantized(stored) else self._tensors.span(stored).dtype
