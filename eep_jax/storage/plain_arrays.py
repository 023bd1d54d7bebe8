"""Plain arrays: stored by Orbax as one uncompressed chunk, a file of just their bytes.

Orbax restores such an array like any other, and we read it at the speed of the storage.

    <array>/.zarray     shape, dtype, chunks (https://zarr-specs.readthedocs.io, version 2)
    <array>/0.0.0.0     the bytes, in C order
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp

from eep_jax.errors import CheckpointError
from eep_jax.storage.blocks import PlainBlock, plain_blocks

HEAD = ".zarray"
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class PlainArray:
    """The file of the bytes, with shape and dtype from the head."""

    path: pathlib.Path
    shape: tuple[int, ...]
    dtype: np.dtype

    def blocks(self) -> Iterator[PlainBlock]:
        """The reads of the whole array. Raises CheckpointError for another size, and OSError."""
        count = math.prod(self.shape)
        found, expected = self.path.stat().st_size, count * self.dtype.itemsize
        if found != expected:
            raise CheckpointError(
                f"{self.path} has {found} bytes, {self.dtype}{list(self.shape)} has {expected}; "
                "restore it from a copy"
            )
        yield from plain_blocks(0, count, self.dtype, self.path, 0)


def plain_array(directory: pathlib.Path) -> PlainArray:
    """Opens an array. Raises CheckpointError if it is missing or not one plain chunk."""
    try:
        head = json.loads((directory / HEAD).read_text())
        shape = tuple(int(size) for size in head["shape"])
        is_plain = not head["compressor"] and not head["filters"] and head["order"] == "C"
        if not is_plain or tuple(head["chunks"]) != tuple(max(1, size) for size in shape):
            raise ValueError(f"{head} is not one plain chunk")
        dtype = _BFLOAT16 if head["dtype"] == "bfloat16" else np.dtype(head["dtype"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory} is not readable as a plain array: {error}") from error
    return PlainArray(directory / (".".join("0" * len(shape)) or "0"), shape, dtype)


def save_plain(directory: pathlib.Path, tree: Mapping) -> None:
    """Saves arrays with Orbax so that `plain_array` opens each as `<directory>/<its name>`.

    The name of nested ones, `{"dense": {name: array}}`, is `dense.<name>`. Raises whatever Orbax
    raises.
    """
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False, use_compression=False)
    with ocp.Checkpointer(handler) as orbax:
        orbax.save(directory, args=ocp.args.PyTreeSave(dict(tree)))
