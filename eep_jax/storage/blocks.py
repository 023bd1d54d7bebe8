"""Blocks: parts of an array on storage, and the ways to load each into its target.

Several threads read an array block by block, in any order. `at` counts the values of the array in C
order. Values that the file stores as the target does are read directly into host memory; others
pass through a small buffer that stays in the cache, so memory is written once in either case.
"""

import contextlib
import dataclasses
import os
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import numpy as np

from eep_jax.errors import CheckpointError
from eep_jax.heap.copies import copy_values
from eep_jax.storage.digests import BLOCK_BYTES, block_digest

_TRANSPOSED_BYTES = 512 << 10  # of a matrix that are read before they are transposed
_AHEAD_BYTES = 16 << 20  # requested from storage at least, if the page cache lacks the bytes


@runtime_checkable
class Target(Protocol):
    """Memory that an array is loaded into. Several threads may store blocks at once."""

    dtype: np.dtype

    def memory(self, at: int, count: int) -> np.ndarray | None:
        """The host memory of these values, `[count]`; None if there is none, or it has gaps."""

    def put(self, at: int, values: np.ndarray) -> None:
        """Stores values from `at` on, in C order, converted to `dtype`. Never blocks."""


class ArrayTarget:
    """An array in host memory."""

    def __init__(self, array: np.ndarray):
        self.dtype, self._flat = array.dtype, array.reshape(-1)

    def memory(self, at: int, count: int) -> np.ndarray:
        return self._flat[at : at + count]

    def put(self, at: int, values: np.ndarray) -> None:
        copy_values(self._flat[at : at + values.size].reshape(values.shape), values)


class Files:
    """Open files by path. Thread-safe."""

    def __init__(self):
        self._numbers: dict[pathlib.Path, int] = {}
        self._lock = threading.Lock()

    def read(self, path: pathlib.Path, start: int, buffer: np.ndarray) -> None:
        """Fills `buffer` with the bytes of a file from `start` on. May block as storage does.

        Raises OSError, and CheckpointError if the file ends before.
        """
        number, data = self._number(path), buffer.reshape(-1).view(np.uint8)
        done = self._read_cached(number, data, start)
        if done < data.size:
            ahead = max(_AHEAD_BYTES, data.size)
            os.posix_fadvise(number, start + done, ahead, os.POSIX_FADV_WILLNEED)
        while done < data.size:
            found = os.preadv(number, [data[done:]], start + done)
            if not found:
                raise CheckpointError(
                    f"{path} ends at byte {start + done}, {start + data.size} are expected"
                )
            done += found

    def close(self) -> None:
        with self._lock:
            numbers, self._numbers = list(self._numbers.values()), {}
        for number in numbers:
            os.close(number)

    def _number(self, path: pathlib.Path) -> int:
        with self._lock:
            if path in self._numbers:
                return self._numbers[path]
        opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # may block: not under the lock
        with self._lock:
            number = self._numbers.setdefault(path, opened)
        if number != opened:
            os.close(opened)
        return number

    @staticmethod
    def _read_cached(number: int, data: np.ndarray, start: int) -> int:
        """Reads what the page cache has; returns the number of bytes."""
        with contextlib.suppress(OSError):  # nothing is cached, or the file system cannot tell
            return os.preadv(number, [data], start, os.RWF_NOWAIT)
        return 0


class ScratchBuffer:
    """Reused memory of one thread."""

    def __init__(self):
        self._data, self._used = np.empty(0, np.uint8), 0

    def take(self, nbytes: int) -> np.ndarray:
        """uint8 `[nbytes]` with undefined content, valid until `reset`."""
        used, self._used = self._used, self._used + -(-nbytes // 64) * 64
        if self._used > self._data.size:
            self._data, used, self._used = np.empty(self._used, np.uint8), 0, self._used - used
        return self._data[used : used + nbytes]

    def reset(self) -> None:
        self._used = 0


class WriteGate:
    """Context manager around writes; entering it raises TimeoutError once it is closed."""

    def __init__(self):
        self._condition, self._inside, self._closed = threading.Condition(), 0, False

    def __enter__(self) -> None:
        with self._condition:
            if self._closed:
                raise TimeoutError("it came too late")
            self._inside += 1

    def __exit__(self, *_) -> None:
        with self._condition:
            self._inside -= 1
            self._condition.notify_all()

    @property
    def is_closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Closes it, after the writes under way: memory copies, which do not block."""
        with self._condition:
            self._closed = True
            self._condition.wait_for(lambda: self._inside == 0)


@dataclasses.dataclass(frozen=True)
class Worker:
    """What a thread loads blocks with: open files, its scratch memory, the gate for writes."""

    files: Files
    scratch: ScratchBuffer
    gate: WriteGate


@runtime_checkable
class Block(Protocol):
    def load_into(self, worker: Worker, target: Target, *, in_place: bool, checked: bool) -> bytes:
        """Reads and stores the block; returns the digest of its bytes if `checked`.

        `in_place`: it may be read into the target's own memory, bypassing the gate.
        """


@dataclasses.dataclass(frozen=True)
class PlainBlock:
    """Values that the file stores contiguously."""

    at: int
    count: int
    dtype: np.dtype
    path: pathlib.Path
    start: int

    def load_into(self, worker: Worker, target: Target, *, in_place: bool, checked: bool) -> bytes:
        memory = None
        if in_place and target.dtype == self.dtype:
            memory = target.memory(self.at, self.count)
        nbytes = self.count * self.dtype.itemsize
        data = worker.scratch.take(nbytes) if memory is None else memory.view(np.uint8)
        worker.files.read(self.path, self.start, data)
        found = block_digest(data) if checked else b""  # while it is in the cache
        if memory is None:
            with worker.gate:
                target.put(self.at, data.view(self.dtype))
        return found


@dataclasses.dataclass(frozen=True)
class TransposedBlock:
    """A matrix `[rows columns]` in the file that is `[columns rows]` in the array."""

    at: int
    shape: tuple[int, int]
    dtype: np.dtype
    path: pathlib.Path
    start: int

    def load_into(self, worker: Worker, target: Target, *, in_place: bool, checked: bool) -> bytes:
        rows, columns = self.shape
        memory = target.memory(self.at, rows * columns)
        if memory is None:
            self._load_whole(worker, target)
            return b""
        out, row_bytes = memory.reshape(columns, rows), columns * self.dtype.itemsize
        step = max(1, _TRANSPOSED_BYTES // row_bytes)
        for row in range(0, rows, step):
            worker.scratch.reset()
            part = self._read(worker, self.start + row * row_bytes, min(step, rows - row))
            if part.dtype != target.dtype:  # faster than while transposing
                part, narrow = _like(part, target.dtype, worker.scratch), part
                copy_values(part, narrow)
            with worker.gate:
                copy_values(out[:, row : row + step], part.T)
        return b""

    def _load_whole(self, worker: Worker, target: Target) -> None:
        values = self._read(worker, self.start, self.shape[0]).T
        transposed = _like(values, target.dtype, worker.scratch)
        copy_values(transposed, values)
        with worker.gate:
            target.put(self.at, transposed)

    def _read(self, worker: Worker, start: int, rows: int) -> np.ndarray:
        data = worker.scratch.take(rows * self.shape[1] * self.dtype.itemsize)
        worker.files.read(self.path, start, data)
        return data.view(self.dtype).reshape(rows, self.shape[1])


def _like(values: np.ndarray, dtype: np.dtype, scratch: ScratchBuffer) -> np.ndarray:
    return scratch.take(values.size * dtype.itemsize).view(dtype).reshape(values.shape)


@dataclasses.dataclass(frozen=True)
class ComputedBlock:
    """Values that `make(files, scratch)` computes from what it reads."""

    at: int
    make: Callable[[Files, ScratchBuffer], np.ndarray]

    def load_into(self, worker: Worker, target: Target, *, in_place: bool, checked: bool) -> bytes:
        values = self.make(worker.files, worker.scratch)
        with worker.gate:
            target.put(self.at, values)
        return b""


def plain_blocks(
    at: int, count: int, dtype: np.dtype, path: pathlib.Path, start: int
) -> Iterator[PlainBlock]:
    """`count` values from byte `start` of a file, in blocks of BLOCK_BYTES."""
    step = BLOCK_BYTES // dtype.itemsize
    for done in range(0, count, step):
        size = min(step, count - done)
        yield PlainBlock(at + done, size, dtype, path, start + done * dtype.itemsize)
