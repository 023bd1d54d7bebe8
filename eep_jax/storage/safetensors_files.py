"""Index of the tensors in the safetensors files of a directory.

A file is 8 bytes that hold the length of a JSON header, the header (dtype, shape and offsets of
each tensor), and the bytes of the tensors (https://github.com/huggingface/safetensors). A file is
opened when one of its tensors is first looked up.
"""

import dataclasses
import json
import math
import os
import pathlib

import ml_dtypes
import numpy as np

from eep_jax.errors import CheckpointError

INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"
HEADER_BYTES_MAX = 100 << 20  # the format's own limit
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor's header; `start` and `end` are offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class TensorSpan:
    """Bytes of a tensor, or of one index of its first axis, with dtype and shape."""

    path: pathlib.Path
    start: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    def part(self, start: int, stop: int) -> "TensorSpan":
        """These indices of the first axis."""
        row = self.nbytes // self.shape[0]
        shape = (stop - start, *self.shape[1:])
        return dataclasses.replace(self, start=self.start + start * row, shape=shape)

    def reshaped(self, shape: tuple[int, ...]) -> "TensorSpan":
        """The same bytes under another shape of as many values."""
        return dataclasses.replace(self, shape=shape)


class SafetensorsFile:
    """One file, whose header is read and checked against the file's size."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        try:
            with path.open("rb") as file:
                self.tensors = _header(file, os.fstat(file.fileno()).st_size)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is not readable as a safetensors file: {error!r}; download it again"
            ) from error

    def span(self, key: str, index: int | None = None) -> TensorSpan:
        """A tensor, or `index` of its first axis. Raises CheckpointError for an unknown dtype."""
        info = self.tensors[key]
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.path}: {key} has dtype {info.dtype}, supported are {sorted(DTYPES)}"
            )
        whole = TensorSpan(self.path, info.start, DTYPES[info.dtype], info.shape)
        if index is None:
            return whole
        part = dataclasses.replace(whole, shape=whole.shape[1:])
        return dataclasses.replace(part, start=whole.start + index * part.nbytes)


class SafetensorsFiles:
    """All tensors of a directory, by key, in one file or in the shards of an index.

    Raises CheckpointError if the directory has neither.
    """

    def __init__(self, root: pathlib.Path):
        self.root = root
        self._file_of = _files_by_key(root)
        self._open: dict[str, SafetensorsFile] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._file_of

    @property
    def paths(self) -> list[pathlib.Path]:
        return [self.root / name for name in sorted(set(self._file_of.values()))]

    def path_of(self, key: str) -> pathlib.Path:
        """The file of a tensor; for an unknown key the index, or the only file."""
        if key in self._file_of:
            return self.root / self._file_of[key]
        index = self.root / INDEX
        return index if index.exists() else self.root / ONE_FILE

    def span(self, key: str, shape: tuple[int, ...], index: int | None = None) -> TensorSpan:
        """The tensor, or `index` of its first axis; `shape` is that of the whole tensor.

        Raises CheckpointError, which names file, key and shapes, if it is missing or of another
        shape.
        """
        if key not in self._file_of:
            raise CheckpointError(
                f"{self.path_of(key)} has no tensor {key}, expected one of shape {list(shape)}"
            )
        file = self._opened(self._file_of[key])
        if key not in file.tensors:
            raise CheckpointError(
                f"{file.path} has no tensor {key}, expected one of shape {list(shape)}; "
                f"{INDEX} assigns it to this file; download both again"
            )
        found = file.tensors[key].shape
        if found != tuple(shape):
            raise CheckpointError(
                f"{file.path}: {key} has shape {list(found)}, expected {list(shape)}"
            )
        return file.span(key, index)

    def shape(self, key: str) -> tuple[int, ...] | None:
        """Shape of the tensor; None if there is none of this key."""
        tensors = self._opened(self._file_of[key]).tensors if key in self else {}
        return tensors[key].shape if key in tensors else None

    def find(self, key: str, index: int | None) -> TensorSpan | None:
        """The tensor, or `index` of its first axis, of any shape; None for an unknown key."""
        return self._opened(self._file_of[key]).span(key, index) if key in self else None

    def _opened(self, name: str) -> SafetensorsFile:
        if name not in self._open:
            self._open[name] = SafetensorsFile(self.root / name)
        return self._open[name]


def _files_by_key(root: pathlib.Path) -> dict[str, str]:
    index, one = root / INDEX, root / ONE_FILE
    if index.exists():
        try:
            found = dict(json.loads(index.read_text())["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index} has no readable weight_map: {error!r}") from error
        missing = sorted(name for name in set(found.values()) if not (root / name).exists())
        if missing:
            raise CheckpointError(f"{root} lacks {missing}, which {INDEX} names; download them")
        return found
    if one.exists():
        return dict.fromkeys(SafetensorsFile(one).tensors, ONE_FILE)
    raise CheckpointError(
        f"{root} holds no weights: expected {INDEX} and its shards, or {ONE_FILE}"
    )


def _header(file, file_bytes: int) -> dict[str, TensorInfo]:
    if file_bytes < 8:
        raise ValueError(f"the file has {file_bytes} bytes, a header needs 8 or more")
    length = int.from_bytes(file.read(8), "little")
    if length > min(HEADER_BYTES_MAX, file_bytes - 8):
        raise ValueError(f"the header would be {length} bytes, the file has {file_bytes}")
    header, found = json.loads(file.read(length)), {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        start, end = (8 + length + int(offset) for offset in entry["data_offsets"])
        info = TensorInfo(entry["dtype"], tuple(entry["shape"]), start, end)
        width = DTYPES[info.dtype].itemsize if info.dtype in DTYPES else 0
        expected = math.prod(info.shape) * width or end - start
        if not 8 + length <= start <= end <= file_bytes or end - start != expected:
            raise ValueError(
                f"{key} of {info.dtype}{list(info.shape)} would be bytes {start} to {end} of "
                f"{file_bytes}"
            )
        found[key] = info
    return found
