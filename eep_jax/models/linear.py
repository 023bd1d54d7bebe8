"""Projections as nnx has them, with products that a GPU does well for one row, too."""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.device import platform


def linear(inputs: int, outputs: int, **options) -> nnx.Linear:
    """An nnx.Linear whose product is `dot_of_rows`."""
    return nnx.Linear(inputs, outputs, dot_general=dot_of_rows, **options)


def dot_of_rows(x: Float[Array, "*T D"], weights: Float[Array, "D N"], *arguments, **options):
    """As `lax.dot_general`; on a GPU a row that is alone gets one of zeros beside it.

    XLA makes a product of one row and few enough weights a sum of products, each of which it rounds
    to bfloat16 and writes to memory first. That is less exact, and slower: of one sequence, a layer
    of Qwen3-30B-A3B took an H100 107 us so, and 154 us without the row beside it.
    """
    if platform() == "cpu" or x.size != x.shape[-1]:
        return lax.dot_general(x, weights, *arguments, **options)
    two = jnp.pad(x.reshape(1, -1), ((0, 1), (0, 0)))
    found = lax.dot_general(two, weights, (((1,), (0,)), ((), ())), *arguments[1:], **options)
    return found[:1].reshape(*x.shape[:-1], -1)
