"""Two readings of the device's own clock around a chain of exchanges: the host is not in it.

The first repetition is outside: once it has ended, every rank has come.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32, UInt32

from pallas_kernels import simt
from pallas_kernels.device import platform
from pallas_kernels.simt import entry

UNROLLED = 4  # repetitions in one turn of the loop, so that the GPU is seldom ahead of the host


def stamp(suspicion: Int32[Array, "R"]) -> tuple[UInt32[Array, "2"], Int32[Array, "R"]]:
    """Nanoseconds, low and high half, once `suspicion` is known; and that same suspicion.

    What needs the returned suspicion begins after the reading.
    """
    if platform() == "gpu":
        return _stamp_gpu(suspicion)
    kinds = jax.ShapeDtypeStruct((2,), jnp.uint32), jax.ShapeDtypeStruct(suspicion.shape, jnp.int32)
    return jax.pure_callback(_stamp_cpu, kinds, suspicion)


def _stamp_cpu(suspicion):
    now_ns = time.perf_counter_ns()
    return np.array([now_ns & 0xFFFFFFFF, now_ns >> 32], np.uint32), np.asarray(suspicion)


def _stamp_gpu(suspicion):
    count = suspicion.shape[0]

    def body(given, ns, same):
        with simt.when(simt.thread() == 0):
            now = simt.now_ns()
            simt.store(simt.address(ns), now.narrow())
            simt.store(simt.address(ns, 4), (now >> 32).narrow())

            def one(index) -> None:
                simt.store(entry(same, index), simt.load(entry(given, index)))

            simt.each(simt.word(0), count, 1, one)

    out = {"ns": ((2,), jnp.uint32), "same": ((count,), jnp.int32)}
    found = simt.kernel(body, suspicion, out=out, grid=1, name="stamp")
    return found["ns"], found["same"]


def timed_chain(step, repetitions: int):
    """`((round, suspicion, vote), *operands) -> (carry, begin, end)`: one repetition, a reading,
    `repetitions` more, a reading. `step(carry, *operands) -> carry`.

    Raises ValueError unless `repetitions` is a multiple of UNROLLED.
    """
    if repetitions % UNROLLED:
        raise ValueError(f"{repetitions=} must be a multiple of {UNROLLED}")

    def read(carry):
        round_, suspicion, vote = carry
        ns, suspicion = stamp(suspicion)
        return ns, (round_, suspicion, vote)

    def run(carry, *operands):
        def turn(_, carry):
            for _ in range(UNROLLED):
                carry = step(carry, *operands)
            return carry

        begin, carry = read(step(carry, *operands))
        end, carry = read(lax.fori_loop(0, repetitions // UNROLLED, turn, carry))
        return carry, begin, end

    return run


def microseconds(begin, end, repetitions: int) -> float:
    """Microseconds of one repetition, from two readings.

    >>> import numpy as np
    >>> microseconds(np.array([(1 << 32) - 100_000, 1]), np.array([200_000, 2]), 10)
    30.0
    """
    ns = [(int(words[1]) << 32) + int(words[0]) for words in (begin, end)]
    return (ns[1] - ns[0]) / repetitions / 1e3
