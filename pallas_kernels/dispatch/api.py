"""Dispatch inside a compiled step."""

import jax
import jax.numpy as jnp
from jax.experimental.buffer_callback import buffer_callback
from jaxtyping import Array, Float, Float32, Int32, UInt8, UInt32

from pallas_kernels.call import Call
from pallas_kernels.device import check_exchange, platform
from pallas_kernels.dispatch.config import DispatchConfig, config_for
from pallas_kernels.dispatch.host import HostDispatch
from pallas_kernels.window import WindowLayout


def dispatch(
    x: Float[Array, "T D"],
    slots: Int32[Array, "T K"],
    weights: Float32[Array, "T K"],
    heap: UInt8[Array, "N B"],
    call: Call,
    *,
    layout: WindowLayout,
    slots_per_rank: int,
    slab_bytes: int = 0,
    config: DispatchConfig | None = None,
) -> tuple[
    "Float[Array, 'R T D'] | RowsInWindow",
    Int32[Array, "R T K"],
    Float32[Array, "R T K"],
    Int32[Array, "R"],
    UInt32[Array, ""],
]:
    """Sends each token once to every rank that holds one of its K slots; receives from all sources.

    `slots` are flat ids, -1 for a choice that has no live replica. Returns for every source its
    rows, their slots on this rank (-1: not here) and weights, the suspicion, and the largest vote
    of all ranks heard. Rows without a slot here are zero. Inactive and suspected ranks are skipped.

    On a GPU the rows are a `mosaic_gpu.RowsInWindow`: they stay where they arrived, for
    `expert_gemm`; its `array()` copies them. `config` is how the kernels are launched there, and
    `heap` may be only the head of the range, if `slab_bytes` says how far slabs are apart.

    The specification is `reference.dispatch_reference`. Raises ValueError for more tokens than the
    window holds, NotImplementedError for what the device's implementation does not take.
    """
    tokens, hidden = x.shape
    check_exchange(layout, tokens, hidden, slots.shape[1])
    if platform() == "gpu":
        # Imported here: the CPU path needs nothing of Mosaic GPU.
        from pallas_kernels.dispatch.mosaic_gpu import dispatch_mosaic
        from pallas_kernels.gpu import ExchangeSpec

        config = config or config_for(tokens, slots.shape[1], slots_per_rank)
        place = ExchangeSpec(layout, slots_per_rank, slab_bytes)
        return dispatch_mosaic(x, slots, weights, heap, call, place, config)
    sources, choices = layout.ranks, slots.shape[1]
    shapes = (
        jax.ShapeDtypeStruct((sources, tokens, hidden), x.dtype),
        jax.ShapeDtypeStruct((sources, tokens, choices), jnp.int32),
        jax.ShapeDtypeStruct((sources, tokens, choices), jnp.float32),
        jax.ShapeDtypeStruct((sources,), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.uint32),
    )
    # It writes to peers, so XLA must neither drop nor merge it.
    run = buffer_callback(HostDispatch(layout, slots_per_rank), shapes, has_side_effect=True)
    return run(heap, x, slots, weights, call.active, call.scalars(), call.suspicion)
