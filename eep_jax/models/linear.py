"""NNX projections; on a GPU the product of a row has the same bits beside any others."""

from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.product.api import product, products


def linear(inputs: int, outputs: int, **options) -> nnx.Linear:
    """An nnx.Linear whose product is `dot_of_rows`."""
    return nnx.Linear(inputs, outputs, dot_general=dot_of_rows, **options)


def dot_of_rows(
    x: Float[Array, "*T D"],
    weights: Float[Array, "D N"],
    dimension_numbers,
    preferred_element_type=None,
    **options,
) -> Float[Array, "*T N"]:
    """`product`, with the arguments that nnx.Linear gives to `lax.dot_general`."""
    del dimension_numbers, options
    return product(x, weights, out_dtype=preferred_element_type)


def project_together(x: Float[Array, "*T D"], *layers: nnx.Linear) -> list[Float[Array, "*T _"]]:
    """`layer(x)` for each of `layers`, with one kernel for their products where there is one."""
    found = products(x, [layer.kernel[...] for layer in layers])
    biases = [None if layer.bias is None else layer.bias[...] for layer in layers]
    return [y if bias is None else y + bias for y, bias in zip(found, biases, strict=True)]
