"""Combine inside a compiled step."""

import jax
import jax.numpy as jnp
from jax.experimental.buffer_callback import buffer_callback
from jaxtyping import Array, Float, Float32, Int32, UInt8

from pallas_kernels.call import Call
from pallas_kernels.combine.config import CombineConfig
from pallas_kernels.combine.host import HostCombine
from pallas_kernels.device import check_exchange, platform
from pallas_kernels.window import WindowLayout


def combine(
    results: "Float[Array, 'R T K D'] | ResultsAtHome",
    received: Int32[Array, "R T K"],
    sent_weights: Float32[Array, "R T K"],
    slots: Int32[Array, "T K"],
    weights: Float32[Array, "T K"],
    heap: UInt8[Array, "N B"],
    call: Call,
    *,
    layout: WindowLayout,
    slots_per_rank: int,
    slab_bytes: int = 0,
    config: CombineConfig | None = None,
) -> tuple[Float32[Array, "T D"], Int32[Array, "R"]]:
    """Sends results to the sources of their tokens; sums what comes home for this rank's tokens.

    `results`, `received` and `sent_weights` belong to the rows dispatch received; `slots` and
    `weights` to the rank's own tokens: `y[t] = sum_k weights[t, k] * result of choice k`, float32.
    Returns y and the suspicion. A choice whose slot is -1 adds nothing.

    The mode is the layout's: `per_choice` returns one row per choice and sums in the order of k, so
    the bits do not depend on the placement; `per_rank` returns one partial sum per rank and token.

    On a GPU results travel in the window's row dtype, and sums are float32. `config` is how the
    kernels are launched there; for `slab_bytes` see dispatch.

    The specification is `reference.combine_reference`. Raises ValueError for more tokens than the
    window holds, NotImplementedError for what the device's implementation does not take.
    """
    _, tokens, choices, hidden = results.shape
    check_exchange(layout, tokens, hidden, choices)
    if platform() == "gpu":
        # Imported here: the CPU path needs nothing of Mosaic GPU.
        from pallas_kernels.combine.mosaic_gpu import combine_mosaic
        from pallas_kernels.gpu import ExchangeSpec

        config = config or CombineConfig()
        place = ExchangeSpec(layout, slots_per_rank, slab_bytes)
        data = (results, received, sent_weights, slots, weights)
        return combine_mosaic(*data, heap, call, place, config)
    shapes = (
        jax.ShapeDtypeStruct((tokens, hidden), jnp.float32),
        jax.ShapeDtypeStruct((layout.ranks,), jnp.int32),
    )
    run = buffer_callback(HostCombine(layout, slots_per_rank), shapes, has_side_effect=True)
    data = (results, received, sent_weights, slots, weights)
    return run(heap, *data, call.active, call.scalars(), call.suspicion)
