"""What this device, and a window of this size, can do."""

import jax
import numpy as np

from pallas_kernels.window import WindowLayout


def check_exchange(layout: WindowLayout, tokens: int, hidden: int, choices: int) -> None:
    """Raises where an exchange does not fit the window, or this device has no implementation."""
    if tokens > layout.tokens or hidden != layout.hidden or choices != layout.choices:
        raise ValueError(
            f"{tokens} tokens x {hidden} channels x {choices} choices do not fit a window of "
            f"{layout.tokens} x {layout.hidden} x {layout.choices}; build the WindowLayout for them"
        )
    if np.dtype(layout.row_dtype) != np.float32:
        raise NotImplementedError(
            f"row_dtype={layout.row_dtype!r}: the host path moves float32 rows"
        )
    if jax.default_backend() != "cpu":
        raise NotImplementedError(
            f"the exchange runs on host memory only, not on {jax.default_backend()!r}; "
            "set JAX_PLATFORMS=cpu"
        )
