"""Product of a step's rows with a weight matrix, inside a compiled step."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.device import platform

MULTIPLE = 64  # of both sides of a weight matrix on a GPU; others are padded with zeros


def product(
    x: Float[Array, "*T D"],
    weights: Float[Array, "_ _"],
    *,
    out_dtype=None,
    transposed: bool = False,
) -> Float[Array, "*T _"]:
    """`x @ weights`, or `x @ weights.T` with `transposed`: `products` with one matrix."""
    (found,) = products(x, (weights,), out_dtype=out_dtype, transposed=transposed)
    return found


def products(
    x: Float[Array, "*T D"],
    weights: Sequence[Float[Array, "_ _"]],
    *,
    out_dtype=None,
    transposed: bool = False,
) -> list[Float[Array, "*T _"]]:
    """`x @ w` for each of `weights`, summed in float32.

    On a GPU, in bfloat16, a row's result has the same bits for any number of rows and any place
    among them, and one kernel computes all. Elsewhere XLA multiplies, and its order of sums may
    depend on the number of rows.

    Args:
        x: rows, any leading axes.
        weights: matrices `[D N]`, or `[N D]` if transposed, of x's dtype; N may differ.
        out_dtype: of the results; x's unless given.
        transposed: whether the weights are `[N D]`.

    Returns:
        The products, rounded once to `out_dtype`, one for each matrix.
    """
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    if platform() == "cpu" or any(a.dtype != jnp.bfloat16 for a in (x, *weights)):
        contract = (((x.ndim - 1,), (1 if transposed else 0,)), ((), ()))
        multiply = functools.partial(lax.dot_general, preferred_element_type=out_dtype)
        return [multiply(x, w, contract) for w in weights]
    # Imported here: the CPU path needs nothing of Mosaic GPU.
    from pallas_kernels.product.mosaic_gpu import products_mosaic

    sizes = [w.shape[0 if transposed else 1] for w in weights]
    pad = lambda w: jnp.pad(w, [(0, -size % MULTIPLE) for size in w.shape])
    rows = x.reshape(-1, x.shape[-1])
    rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[-1] % MULTIPLE)))
    found = products_mosaic(rows, [pad(w) for w in weights], out_dtype, transposed)
    return [y[:, :size].reshape(*x.shape[:-1], size) for y, size in zip(found, sizes, strict=True)]
