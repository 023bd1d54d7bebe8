"""The sizes of a model, and what follows from them."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of a Qwen3-MoE style decoder (arXiv 2505.09388). All lengths are in tokens or channels.

    Raises ValueError for sizes that contradict each other; the message holds both numbers.
    """

    name: str
    vocab_size: int  # V
    hidden: int  # D
    layers: int  # L
    query_heads: int
    kv_heads: int
    head_dim: int
    experts: int  # E
    experts_per_token: int  # K
    expert_hidden: int  # F
    norm_topk_prob: bool = True  # renormalise the K router weights to sum to one
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    bos_token: int = 0
    eos_token: int = 0

    def __post_init__(self):
        if self.query_heads % self.kv_heads:
            raise ValueError(f"{self.query_heads=} must be a multiple of {self.kv_heads=}")
        if not 0 < self.experts_per_token <= self.experts:
            raise ValueError(f"{self.experts_per_token=} must be between 1 and {self.experts=}")
        if self.head_dim % 2:
            raise ValueError(f"{self.head_dim=} must be even, RoPE rotates pairs")

    @property
    def queries_per_kv(self) -> int:
        return self.query_heads // self.kv_heads

    @property
    def expert_shape(self) -> tuple[int, int, int, int]:
        """Shape of one expert, all layers: [L, 3 (gate, up, down transposed), F, D]."""
        return (self.layers, 3, self.expert_hidden, self.hidden)

    @property
    def expert_elements(self) -> int:
        layers, matrices, rows, columns = self.expert_shape
        return layers * matrices * rows * columns

    @property
    def parameters(self) -> int:
        """Number of weights in the whole model."""
        attention = self.hidden * self.head_dim * (2 * self.query_heads + 2 * self.kv_heads)
        norms = 2 * self.hidden + 2 * self.head_dim
        layer = attention + norms + self.hidden * self.experts
        dense = 2 * self.vocab_size * self.hidden + self.hidden + self.layers * layer
        return dense + self.experts * self.expert_elements
