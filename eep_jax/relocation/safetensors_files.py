"""Tensors in the safetensors files of a directory, mapped: what is read is what is used.

A file is 8 bytes that hold the length of a JSON header, the header (dtype, shape and place of each
tensor), and the bytes of the tensors (https://github.com/huggingface/safetensors). Files are opened
when a tensor of theirs is first asked for.
"""

import dataclasses
import json
import math
import mmap
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


class SafetensorsFile:
    """One file; its header is checked against its size, its tensors are views of a mapping."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._bytes = np.frombuffer(self._map, np.uint8)
            self.tensors = _header(self._bytes)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is no readable safetensors file: {error!r}") from error

    def read(self, key: str) -> np.ndarray:
        """The tensor as it is stored, not copied. Raises CheckpointError for an unknown dtype."""
        info = self.tensors[key]
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.path}: {key} has dtype {info.dtype}, supported are {sorted(DTYPES)}"
            )
        return self._bytes[info.start : info.end].view(DTYPES[info.dtype]).reshape(info.shape)

    def place(self, key: str, index: int | None) -> tuple[int, int]:
        """First byte, and the one after the last, of a tensor or of one part of its first axis."""
        info = self.tensors[key]
        if index is None:
            return info.start, info.end
        row = (info.end - info.start) // info.shape[0]
        return info.start + index * row, info.start + (index + 1) * row

    def announce(self, key: str, index: int | None) -> None:
        """These bytes are wanted soon: the system reads ahead."""
        start, end = self.place(key, index)
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_WILLNEED, first, end - first)


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

    def read(self, key: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor, not copied.

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
        return file.read(key)

    def announce(self, key: str, index: int | None) -> None:
        """The tensor, or this part of its first axis, is wanted soon. Never fails."""
        if key in self._file_of and key in (file := self._opened(self._file_of[key])).tensors:
            file.announce(key, index)

    def place(self, key: str, index: int | None) -> tuple[pathlib.Path, int, int] | None:
        """File, first byte, and the one after the last; None where there is no such tensor."""
        if key not in self._file_of:
            return None
        file = self._opened(self._file_of[key])
        return file.path, *file.place(key, index)

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


def _header(data: np.ndarray) -> dict[str, TensorInfo]:
    if len(data) < 8:
        raise ValueError(f"{len(data)} bytes are no header")
    length = int(data[:8].view("<u8")[0])
    if length > min(HEADER_BYTES_MAX, len(data) - 8):
        raise ValueError(f"the header would be {length} bytes, the file has {len(data)}")
    header, found = json.loads(data[8 : 8 + length].tobytes()), {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        start, end = (8 + length + int(offset) for offset in entry["data_offsets"])
        info = TensorInfo(entry["dtype"], tuple(entry["shape"]), start, end)
        width = DTYPES[info.dtype].itemsize if info.dtype in DTYPES else 0
        expected = math.prod(info.shape) * width or end - start
        if not 8 + length <= start <= end <= len(data) or end - start != expected:
            raise ValueError(
                f"{key} of {info.dtype}{list(info.shape)} would be bytes {start} to {end} of "
                f"{len(data)}"
            )
        found[key] = info
    return found
