"""Shards: one expert each, as an Orbax checkpoint in the layout that Orbax's P2P service serves.

The weights in `<expert>/state/` are one uncompressed chunk: a file of just their bytes. A reader
that knows dtype and shape maps that file, or receives it into memory.
"""

import logging
import math
import pathlib

import numpy as np
from orbax.checkpoint.experimental.emergency.p2p import constants

from eep_jax.storage.checkpoint import restore
from eep_jax.storage.plain_arrays import save_plain

WEIGHTS = "weights"  # the one leaf of a shard
PROCESS = 0  # Orbax's process index: every shard is written by one process


def save_shard(directory: pathlib.Path, weights: np.ndarray) -> None:
    """Writes `directory`, which must not exist, in the dtype of `weights`."""
    save_plain(directory / constants.STATE_SUBDIR, {WEIGHTS: weights})
    # By this name Orbax's service finds the owner of a shard. Without OCDBT it stays empty.
    (directory / constants.STATE_SUBDIR / f"{constants.PROCESS_SUBDIR_PREFIX}{PROCESS}").mkdir()


def load_shard(directory: pathlib.Path) -> np.ndarray:
    """The weights in `directory`. Raises whatever Orbax and TensorStore raise."""
    return restore(directory / constants.STATE_SUBDIR, [WEIGHTS])[WEIGHTS]


def chunk_name(dimensions: int) -> str:
    """Path, inside a shard, of the file with the bytes of an array of `dimensions` axes."""
    return f"{constants.STATE_SUBDIR}/{WEIGHTS}/{'.'.join('0' * dimensions)}"


def map_shard(directory: pathlib.Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The weights in `directory`, mapped read-only; no byte is read yet.

    Raises OSError if the file is missing, and ValueError if it has another size.
    """
    path, nbytes = directory / chunk_name(len(shape)), math.prod(shape) * np.dtype(dtype).itemsize
    if (found := path.stat().st_size) != nbytes:
        raise ValueError(f"{path} has {found} bytes, {shape} of {dtype} has {nbytes}")
    return np.memmap(path, np.uint8, "r").view(dtype).reshape(shape)


class _NoOcdbt(logging.Filter):
    """Drops Orbax's warning, one for each shard, that there is no OCDBT to merge: it is off."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "Skipping merge of OCDBT" not in str(record.msg)


logging.getLogger("absl").addFilter(_NoOcdbt())
