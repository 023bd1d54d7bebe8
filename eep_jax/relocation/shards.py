"""One expert as a checkpoint of its own, in the layout that Orbax serves: `<expert>/state/`.

The weights are one chunk, not compressed: a file of its own that holds their bytes and no other. So
who knows dtype and shape may take them from that file, or receive them into memory, as they are.
"""

import logging
import math
import pathlib

import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.experimental.emergency.p2p import constants

WEIGHTS = "weights"  # the one leaf of a shard
PROCESS = 0  # Orbax's process index: every shard is written by one process


def save_shard(directory: pathlib.Path, weights: np.ndarray) -> None:
    """Writes `directory`, which must not exist, in the dtype of `weights`."""
    with _open_plain() as orbax:
        arguments = ocp.args.PyTreeSave({WEIGHTS: weights})
        orbax.save(directory / constants.STATE_SUBDIR, args=arguments)
    # By this name Orbax's service knows whose shard it is. Without OCDBT it stays empty.
    (directory / constants.STATE_SUBDIR / f"{constants.PROCESS_SUBDIR_PREFIX}{PROCESS}").mkdir()


def load_shard(directory: pathlib.Path) -> np.ndarray:
    """The weights in `directory`; raises what Orbax and TensorStore raise for what is no shard."""
    with _open_plain() as orbax:
        arguments = ocp.args.PyTreeRestore(
            item={WEIGHTS: 0}, restore_args={WEIGHTS: ocp.RestoreArgs(restore_type=np.ndarray)}
        )
        return np.asarray(
            orbax.restore(directory / constants.STATE_SUBDIR, args=arguments)[WEIGHTS]
        )


def chunk_name(dimensions: int) -> str:
    """Path, inside a shard, of the file with the bytes of an array of so many dimensions."""
    return f"{constants.STATE_SUBDIR}/{WEIGHTS}/{'.'.join('0' * dimensions)}"


def map_shard(directory: pathlib.Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The weights in `directory` as they are on it, mapped and not read; not to be written to.

    Raises OSError or ValueError where there is no such file, or one of another size.
    """
    path, nbytes = directory / chunk_name(len(shape)), math.prod(shape) * np.dtype(dtype).itemsize
    if (found := path.stat().st_size) != nbytes:
        raise ValueError(f"{path} has {found} bytes, {shape} of {dtype} has {nbytes}")
    return np.memmap(path, np.uint8, "r").view(dtype).reshape(shape)


class _NoOcdbt(logging.Filter):
    """Orbax warns of each shard that there is nothing to merge: that is as wanted here."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "Skipping merge of OCDBT" not in str(record.msg)


logging.getLogger("absl").addFilter(_NoOcdbt())


def _open_plain() -> ocp.Checkpointer:
    """One file for each chunk; TensorStore's third format would compress it."""
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False, use_compression=False)
    return ocp.Checkpointer(handler)
