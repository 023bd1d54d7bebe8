"""A Hugging Face directory read as our checkpoint is: any expert alone, one tensor at a time.

Ranks serve straight from it, each reading the experts of its slots. Nothing is written beside it.
"""

import collections.abc
import functools
import itertools
import pathlib
from collections.abc import Iterator

import numpy as np

from eep_jax.config import ModelConfig
from eep_jax.errors import CheckpointError
from eep_jax.models.families import registry
from eep_jax.models.families.quantized import (
    MXFP4_BLOCK,
    from_fp8,
    from_mxfp4,
    quantization_of,
    scales_shape,
)
from eep_jax.models.families.tensors import ExpertPart, Stored
from eep_jax.models.weights import expert_name
from eep_jax.relocation.checkpoint import MANIFEST, digest, require_same_model
from eep_jax.relocation.safetensors_files import DTYPES, SafetensorsFiles

NARROW = ("F8_E4M3", "U8")  # what quantized weights are stored as
_ENDS = ("", "_blocks", "_scales", "_scale_inv")  # of keys that belong together
_AHEAD = 6  # matrices that are read ahead
_COLUMNS = 64  # that are turned at once, so that both sides stay in the cache


def is_hugging_face(directory) -> bool:
    """Whether it holds a config.json and no checkpoint of ours."""
    root = pathlib.Path(directory)
    return (root / registry.CONFIG).exists() and not (root / MANIFEST).exists()


class HuggingFaceCheckpoint:
    """Reads as a Checkpoint does. `dtype` is that of experts, "" as stored (bfloat16 if quantized).

    Opening it reads config.json and the headers of the files. Raises CheckpointError for what is
    not supported, and for a missing tensor or one of another shape, naming file, key and shapes.
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
            "experts": _Digests(self, experts),
        }

    def require_model(self, model: ModelConfig) -> None:
        """Raises CheckpointError if it is of another model, whatever that is called."""
        require_same_model(self.root, self.model, model, but=("name",))

    def content_name(self, expert: int) -> str:
        """As of a Checkpoint: the files as they are now, without reading them."""
        stats = [(str(path), path.stat()) for path in self.source_files()]
        files = [(path, found.st_size, found.st_mtime_ns) for path, found in stats]
        return f"expert {expert} in {self.dtype} of {files}"

    def source_files(self) -> list[pathlib.Path]:
        """config.json and the files of weights."""
        return [self.root / registry.CONFIG, *self._files.paths]

    def read_dense(self) -> collections.abc.Mapping[str, np.ndarray]:
        """All weights outside the experts, by name, each read when it is looked up."""
        return _Dense(self._dense, self._read)

    def iter_dense(self) -> Iterator[tuple[str, np.ndarray]]:
        """All weights outside the experts, one after the other."""
        yield from self.read_dense().items()

    def read_experts(self, experts: list[int]) -> dict[int, np.ndarray]:
        """Just these experts, each `[L 3 F D]`. Raises CheckpointError for unknown ones."""
        found = {}
        for expert in experts:
            whole = np.empty(self.model.expert_shape, self.dtype)
            for layer, matrix, values in self.iter_expert(expert):
                whole[layer, matrix] = values
            found[expert] = whole
        return found

    def iter_expert(self, expert: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """(layer, matrix, `[F D]`) of one expert, one after the other; nothing else is read.

        A matrix is to be used before the next one is asked for, which may take its memory, and not
        to be written to: it may be the file itself.
        """
        if not 0 <= expert < self.model.experts:
            raise CheckpointError(f"{self.root} has no expert {expert} of {self.model.experts}")
        parts = self._family.expert(self.model, expert)
        groups = [list(g) for _, g in itertools.groupby(parts, lambda p: (p.layer, p.matrix))]
        room = np.empty(self.model.expert_shape[2:], self.dtype)
        for number, members in enumerate(groups):
            # Storage is busy with what comes next while this is turned and written.
            for part in itertools.chain(*groups[number + 1 : number + 1 + _AHEAD]):
                self._announce(part.stored)
            yield members[0].layer, members[0].matrix, self._matrix(members, room)

    def places(self, expert: int) -> list[tuple[pathlib.Path, int, int]]:
        """(file, first byte, last byte + 1) of everything that is read for one expert."""
        parts = (part.stored for part in self._family.expert(self.model, expert))
        tensors = {(stored.key, stored.index) for stored in parts}
        found = (self._files.place(key + end, index) for key, index in tensors for end in _ENDS)
        return sorted(place for place in found if place is not None)

    def _announce(self, stored: Stored) -> None:
        for end in _ENDS:
            self._files.announce(stored.key + end, stored.index)

    def _matrix(self, parts: list[ExpertPart], room: np.ndarray) -> np.ndarray:
        """One matrix `[F D]` of an expert, its bias in the rows below; in `room` if need be."""
        width = self.model.expert_hidden
        for part in parts:
            values = part.stored.form(self._tensor(part.stored))
            if part.bias:
                below = room[width:].reshape(-1)
                below[: values.size], below[values.size :] = values, 0
            elif len(parts) == 1 and values.dtype == room.dtype and values.flags.c_contiguous:
                return values
            else:
                _copy(room[:width], values)
        return room

    def _read(self, stored: Stored) -> np.ndarray:
        return np.array(stored.form(self._tensor(stored)), order="C")

    def _tensor(self, stored: Stored) -> np.ndarray:
        """The tensor, or its part, as values: not copied unless it is quantized."""
        for reader in (self._mxfp4, self._fp8):
            if (found := reader(stored)) is not None:
                return found
        whole = self._files.read(stored.key, stored.shape)
        return whole if stored.index is None else whole[stored.index]

    def _fp8(self, stored: Stored) -> np.ndarray | None:
        key = f"{stored.key}_scale_inv"
        if self._quantization.method != "fp8" or key not in self._files:
            return None
        block = self._quantization.block
        scales = self._files.read(key, scales_shape(stored.shape, block))
        return from_fp8(self._files.read(stored.key, stored.shape), scales, block)

    def _mxfp4(self, stored: Stored) -> np.ndarray | None:
        key = f"{stored.key}_blocks"
        if self._quantization.method != "mxfp4" or key not in self._files:
            return None
        # There the last two axes are the other way round, so that blocks lie along the inputs.
        experts, inputs, outputs = stored.shape
        shape = (experts, outputs, inputs // MXFP4_BLOCK)
        blocks = self._files.read(key, (*shape, MXFP4_BLOCK // 2))[stored.index]
        scales = self._files.read(f"{stored.key}_scales", shape)[stored.index]
        return from_mxfp4(blocks, scales).T

    def _check_all(self) -> None:
        """Every tensor is there in its shape; nothing of it is read."""
        first = self._family.expert(self.model, 0)
        fused = all(part.stored.index is not None for part in first)
        experts = (
            self._family.expert(self.model, e) for e in range(1 if fused else self.model.experts)
        )
        parts = (part.stored for part in itertools.chain.from_iterable(experts))
        for stored in itertools.chain(self._dense.values(), parts):
            self._check(stored)

    def _check(self, stored: Stored) -> None:
        quantized = any(f"{stored.key}_{name}" in self._files for name in ("blocks", "scale_inv"))
        if quantized and self._quantization.method:
            return
        found = self._files.read(stored.key, stored.shape)
        if found.dtype in [DTYPES[name] for name in NARROW]:
            raise CheckpointError(
                f"{self._files.path_of(stored.key)}: {stored.key} is {found.dtype} without scales"
            )

    def _stored_dtype(self) -> np.dtype:
        return self._matrix_dtype(next(iter(self._family.expert(self.model, 0))).stored)

    def _matrix_dtype(self, stored: Stored) -> np.dtype:
        return self._tensor(stored).dtype


def _copy(out: np.ndarray, values: np.ndarray) -> None:
    if values.flags.c_contiguous:
        out[...] = values
        return
    for start in range(0, out.shape[1], _COLUMNS):
        out[:, start : start + _COLUMNS] = values[:, start : start + _COLUMNS]


class _Dense(collections.abc.Mapping):
    """Weights by name, read when they are looked up, so that one is in memory at a time."""

    def __init__(self, stored: dict[str, Stored], read):
        self._stored, self._read = stored, read

    def __getitem__(self, name: str) -> np.ndarray:
        return self._read(self._stored[name])

    def __iter__(self):
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


class _Digests(collections.abc.Mapping):
    """Digest by name of expert; the files have none, so the expert is read at the first look."""

    def __init__(self, checkpoint: HuggingFaceCheckpoint, experts: dict[str, int]):
        self._experts = experts
        read = lambda name: checkpoint.read_experts([experts[name]])[experts[name]]
        self._digest = functools.cache(lambda name: digest(read(name)))

    def __getitem__(self, name: str) -> str:
        if name not in self._experts:
            raise KeyError(name)
        return self._digest(name)

    def __iter__(self):
        return iter(self._experts)

    def __len__(self) -> int:
        return len(self._experts)
