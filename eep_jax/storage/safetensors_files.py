"""Where tensors are in the safetensors files of a directory.

A file is 8 bytes that hold the length of a JSON header, the header (dtype, shape and place of each
tensor), and the bytes of the tensors (https://github.com/huggingface/safetensors). Files are opened
when a tensor of theirs is first asked for.
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
HEADER_BYTES_MAX = 100 << 20  # as the format says
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "U8": np.dtype(np.uint8),
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor; `start` and `end` are bytes of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class TensorSpan:
    """Where a tensor is, or one part of its first axis, and what it is."""

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


class SafetensorsFile:
    """One file, of which the header is read, and checked against its size."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        try:
            with path.open("rb") as file:
                self.tensors = _header(file, os.fstat(file.fileno()).st_size)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is no readable safetensors file: {error!r}") from error

    def place(self, key: str, index: int | None = None) -> TensorSpan:
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

    Raises CheckpointError where the directory has neither.
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
        """The file of a tensor, or what names the files where there is no such tensor."""
        if key in self._file_of:
            return self.root / self._file_of[key]
        index = self.root / INDEX
        return index if index.exists() else self.root / ONE_FILE

    def place(self, key: str, shape: tuple[int, ...], index: int | None = None) -> TensorSpan:
        """Where the tensor is, or `index` of its first axis; `shape` is that of all of it.

        Raises CheckpointError naming file, key, expected and found shape where it is not there, or
        of another shape.
        """
        if key not in self._file_of:
            raise CheckpointError(
                f"{self.path_of(key)} has no tensor {key}, expected one of shape {list(shape)}"
            )
        file = self._opened(self._file_of[key])
        if key not in file.tensors:
            raise CheckpointError(
                f"{file.path} has no tensor {key}, expected one of shape {list(shape)}; "
                f"{INDEX} says it is there"
            )
        found = file.tensors[key].shape
        if found != tuple(shape):
            raise CheckpointError(
                f"{file.path}: {key} has shape {list(found)}, expected {list(shape)}"
            )
        return file.place(key, index)

    def find(self, key: str, index: int | None) -> TensorSpan | None:
        """Where the tensor is, whatever its shape; None where there is no such tensor."""
        return self._opened(self._file_of[key]).place(key, index) if key in self else None

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
            raise CheckpointError(f"{root} lacks {missing}, which {INDEX} names")
        return found
    if one.exists():
        return dict.fromkeys(SafetensorsFile(one).tensors, ONE_FILE)
    raise CheckpointError(
        f"{root} holds no weights: expected {INDEX} and its shards, or {ONE_FILE}"
    )


def _header(file, file_bytes: int) -> dict[str, TensorInfo]:
    if file_bytes < 8:
        raise ValueError(f"{file_bytes} bytes are no header")
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
