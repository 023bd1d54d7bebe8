"""Checks of what this device, and a window of this size, can do."""

import importlib

import jax
import numpy as np

from pallas_kernels.sizes import WIDTH_MULTIPLE
from pallas_kernels.window import WindowLayout

SM_COUNT = 132  # multiprocessors of an H100 and an H200


def platform() -> str:
    """Platform of the program that is being traced: "cpu" or "gpu".

    It is the abstract device of the mesh, if set (lowering for a GPU that is not here), else JAX's
    default backend. Raises NotImplementedError for others.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = getattr(mesh, "abstract_device", None)
    found = device.platform if device is not None else jax.default_backend()
    if found not in ("cpu", "gpu"):
        raise NotImplementedError(
            f"there are kernels for 'cpu' and 'gpu' (NVIDIA Hopper), not for {found!r}; "
            "set JAX_PLATFORMS=cpu or JAX_PLATFORMS=cuda"
        )
    return found


def prepare_loading() -> None:
    """Must be called before an executable with kernels is loaded rather than compiled.

    Importing Mosaic GPU sets the environment variable in which XLA looks for the library that its
    kernels call. Without it no such executable loads before another was compiled.
    """
    if jax.default_backend() == "gpu":
        importlib.import_module("jax.experimental.mosaic.gpu")


def check_exchange(layout: WindowLayout, tokens: int, hidden: int, choices: int) -> None:
    """Checks an exchange against its window and this device.

    Raises:
        ValueError: it does not fit the window.
        NotImplementedError: this device has no implementation for it.
    """
    if tokens > layout.tokens or hidden != layout.hidden or choices != layout.choices:
        raise ValueError(
            f"{tokens} tokens x {hidden} channels x {choices} choices do not fit a window of "
            f"{layout.tokens} x {layout.hidden} x {layout.choices}; build the WindowLayout for them"
        )
    if platform() == "cpu":
        if np.dtype(layout.row_dtype) != np.float32 or layout.dispatch_dtype:
            raise NotImplementedError(
                f"row_dtype={layout.row_dtype!r}, dispatch_dtype={layout.dispatch_dtype!r}: the "
                "host path moves float32 rows; use row_dtype='float32', dispatch_dtype=''"
            )
        return
    if layout.row_dtype != "bfloat16":
        raise NotImplementedError(
            f"row_dtype={layout.row_dtype!r}: the GPU kernels move bfloat16 rows (and fp8 on "
            "dispatch); use row_dtype='bfloat16'"
        )
    if hidden % WIDTH_MULTIPLE:
        raise NotImplementedError(
            f"{hidden} channels: the GPU kernels need a multiple of {WIDTH_MULTIPLE}; pad the model"
        )
    for rows in (tokens, layout.tokens):
        if rows * choices % 4:
            raise NotImplementedError(
                f"{rows} tokens x {choices} choices: the GPU kernels need a product that is a "
                "multiple of 4; use batches and a window of a multiple of 4 rows"
            )
