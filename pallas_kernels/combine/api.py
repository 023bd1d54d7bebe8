"""Combine inside a compiled step."""

import jax
import jax.numpy as jnp
from jax.experimental.buffer_callback import buffer_callback
from jaxtyping import Array, Float, Float32, Int32, UInt8

from pallas_kernels.combine.config import CombineConfig
from pallas_kernels.combine.host import HostCombine
from pallas_kernels.device import check_exchange, platform
from pallas_kernels.exchange.call import Call, Choices, ExchangeSpec


@jax.named_scope("combine")
def combine(
    results: "Float[Array, 'R T K D'] | ResultsAtHome",
    received: Choices,
    choices: Choices,
    heap: UInt8[Array, "N B"],
    call: Call,
    spec: ExchangeSpec,
) -> tuple[Float32[Array, "T D"], Int32[Array, "R"]]:
    """Sends results to the sources of their tokens; sums what comes home for this rank's tokens.

    `y[t] = sum_k weights[t, k] * result of choice k`, in float32. A choice whose slot is -1 adds
    nothing. With the layout's mode `per_choice`, one row per choice comes home and is added in the
    order of k, so the bits do not depend on the placement; with `per_rank`, one partial sum per
    rank and token. On a GPU results travel in the window's row dtype. The specification is
    `reference.combine_reference`.

    Args:
        results: of the received choices, or `handover.ResultsAtHome` if the GEMM sent them already.
        received: Choices `[R T K]` of the rows that dispatch received.
        choices: Choices `[T K]` of this rank's own tokens.
        heap: as in dispatch.
        call: as in dispatch, with its suspicion.
        spec: as in dispatch.

    Returns:
        y and the suspicion.

    Raises:
        ValueError: more tokens than the window holds, or other channels or choices.
        NotImplementedError: shapes or dtypes that this device's implementation does not take.
    """
    _, tokens, per_token, hidden = results.shape
    check_exchange(spec.layout, tokens, hidden, per_token)
    if platform() == "gpu":
        # Imported here: the CPU path does not need Mosaic GPU.
        from pallas_kernels.combine.mosaic_gpu import receive_home, send_home
        from pallas_kernels.handover import ResultsAtHome

        at, config = (heap, call), CombineConfig()
        if isinstance(results, ResultsAtHome):
            sent = results.written
        else:
            sent = send_home(results, received, *at, spec, config)
        return receive_home(choices, *at, sent, spec, config)
    shapes = (
        jax.ShapeDtypeStruct((tokens, hidden), jnp.float32),
        jax.ShapeDtypeStruct((spec.ranks,), jnp.int32),
    )
    run = buffer_callback(HostCombine(spec), shapes, has_side_effect=True)
    call_words = (call.active, call.scalars(), call.suspicion)
    return run(heap, results, *received, *choices, *call_words)
