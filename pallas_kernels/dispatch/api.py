"""Dispatch inside a compiled step."""

import jax
import jax.numpy as jnp
from jax.experimental.buffer_callback import buffer_callback
from jaxtyping import Array, Float, Int32, UInt8, UInt32

from pallas_kernels.device import check_exchange, platform
from pallas_kernels.dispatch.config import config_for
from pallas_kernels.dispatch.host import HostDispatch
from pallas_kernels.exchange.call import Call, Choices, ExchangeSpec


@jax.named_scope("dispatch")
def dispatch(
    x: Float[Array, "T D"],
    choices: Choices,
    heap: UInt8[Array, "N B"],
    call: Call,
    spec: ExchangeSpec,
) -> tuple["Float[Array, 'R T D'] | RowsInWindow", Choices, Int32[Array, "R"], UInt32[Array, ""]]:
    """Sends each token once to every rank that holds one of its K slots; receives from all ranks.

    Inactive and suspected ranks are skipped. The specification is `reference.dispatch_reference`.

    Args:
        x: rows of this rank's tokens.
        choices: flat slot ids and weights `[T K]`; -1 for a choice without a live replica.
        heap: slabs of all ranks, or only their heads if `spec.slab_bytes` says how far apart they
            are.
        call: rank, membership, round, deadline and vote.
        spec: layout and sizes, compiled in.

    Returns:
        The rows of every source, zero without a slot here; on a GPU a `handover.RowsInWindow`,
        which leaves them where they arrived, for `expert_gemm`. Their Choices `[R T K]` on this
        rank. The suspicion. The largest vote of this rank and those that came.

    Raises:
        ValueError: more tokens than the window holds, or other channels or choices.
        NotImplementedError: shapes or dtypes that this device's implementation does not take.
    """
    (tokens, hidden), (_, per_token) = x.shape, choices.slots.shape
    check_exchange(spec.layout, tokens, hidden, per_token)
    if platform() == "gpu":
        # Imported here: the CPU path does not need Mosaic GPU.
        from pallas_kernels.dispatch.mosaic_gpu import dispatch_mosaic

        config = config_for(tokens, per_token, spec.slots_per_rank)
        return dispatch_mosaic(x, choices, heap, call, spec, config)
    shapes = (
        jax.ShapeDtypeStruct((spec.ranks, tokens, hidden), x.dtype),
        jax.ShapeDtypeStruct((spec.ranks, tokens, per_token), jnp.int32),
        jax.ShapeDtypeStruct((spec.ranks, tokens, per_token), jnp.float32),
        jax.ShapeDtypeStruct((spec.ranks,), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.uint32),
    )
    # It writes to peers, so XLA must neither drop nor merge it.
    run = buffer_callback(HostDispatch(spec), shapes, has_side_effect=True)
    rows, slots, weights, suspicion, vote = run(
        heap, x, *choices, call.active, call.scalars(), call.suspicion
    )
    return rows, Choices(slots, weights), suspicion, vote
