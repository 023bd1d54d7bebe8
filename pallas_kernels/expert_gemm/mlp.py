"""Function of one expert: how gate and up become hidden channels, and where biases are stored."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

AnyArray = Array | np.ndarray  # of a device, or of a host's expert GEMM
ACTIVATIONS = ("swiglu", "clamped_swiglu")


@dataclasses.dataclass(frozen=True)
class ExpertMlp:
    """`y = down(activation(gate(x), up(x)))`, with biases if `bias_width` is set.

    - `swiglu`: `silu(gate) * up`.
    - `clamped_swiglu` (gpt-oss): gate is at most `limit`, up between `-limit` and `limit`, then
      `gate * sigmoid(slope * gate) * (up + 1)`.

    With `bias_width` F the weights of an expert `[3 F' D]` have rows below the first F: their first
    F values are the bias of gate, or of up, and the first D that of down. Without (0), all rows are
    weights. Padding of zeros adds nothing in either.
    """

    activation: str = "swiglu"
    limit: float = 7.0
    slope: float = 1.702
    bias_width: int = 0

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"{self.activation=} must be one of {ACTIVATIONS}")
        if self.bias_width < 0:
            raise ValueError(f"{self.bias_width=} must be F, or 0 for no biases")

    def activate(
        self, gate: Float[Array, "*N F"], up: Float[Array, "*N F"]
    ) -> Float[Array, "*N F"]:
        """The hidden channels `[*N F]`."""
        if self.activation == "swiglu":
            return jax.nn.silu(gate) * up
        gate = jnp.minimum(gate, self.limit)
        up = jnp.clip(up, -self.limit, self.limit)
        return gate * jax.nn.sigmoid(self.slope * gate) * (up + 1)

    def split(
        self, expert: Float[AnyArray, "*N 3 G D"]
    ) -> tuple[Float[AnyArray, "*N 3 F D"], tuple[AnyArray, AnyArray, AnyArray] | None]:
        """Returns weights, and biases of gate, up `[*N F]` and down `[*N D]`, or None.

        Raises ValueError if the rows below F have no room for a bias.
        """
        width, (rows, hidden) = self.bias_width, expert.shape[-2:]
        if not width:
            return expert, None
        if (rows - width) * hidden < max(width, hidden):
            raise ValueError(f"{rows} rows of {hidden} have no room for biases below {width=}")
        below = expert[..., width:, :].reshape(*expert.shape[:-2], -1)
        biases = below[..., 0, :width], below[..., 1, :width], below[..., 2, :hidden]
        return expert[..., :width, :], biases


SWIGLU = ExpertMlp()
