"""One expert as a checkpoint of its own, in the layout that Orbax serves: `<expert>/state/`."""

import pathlib

import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.experimental.emergency.p2p import constants

WEIGHTS = "weights"  # the one leaf of a shard


def save_shard(directory: pathlib.Path, weights: np.ndarray) -> None:
    """Writes `directory`, which must not exist, in the dtype of `weights`."""
    with open_orbax() as orbax:
        arguments = ocp.args.PyTreeSave({WEIGHTS: weights})
        orbax.save(directory / constants.STATE_SUBDIR, args=arguments)


def load_shard(directory: pathlib.Path) -> np.ndarray:
    """The weights in `directory`; raises what Orbax and TensorStore raise for what is no shard."""
    with open_orbax() as orbax:
        arguments = ocp.args.PyTreeRestore(
            item={WEIGHTS: 0}, restore_args={WEIGHTS: ocp.RestoreArgs(restore_type=np.ndarray)}
        )
        return np.asarray(
            orbax.restore(directory / constants.STATE_SUBDIR, args=arguments)[WEIGHTS]
        )


def open_orbax(compressed: bool = True) -> ocp.Checkpointer:
    """Weights that are converted are not compressed: bfloat16 shrinks little, and reads slower."""
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=compressed)
    )
