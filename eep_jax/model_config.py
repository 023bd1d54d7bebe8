"""Model configuration: sizes, and options in which families of MoE decoders differ. No JAX."""

import dataclasses

QK_NORMS = ("head", "full", "none")
ROPES = ("default", "linear", "dynamic", "llama3", "yarn")
SCORES = ("softmax", "sigmoid", "softmax_of_chosen")
GROUP_SCORES = ("max", "top2")
ACTIVATIONS = ("swiglu", "clamped_swiglu")


def check_positive(config, *names: str) -> None:
    """Raises ValueError naming the first of these fields that is not positive."""
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(
                f"{type(config).__name__}.{name}={getattr(config, name)} must be positive"
            )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {allowed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotation of queries and keys by position, beside `ModelConfig.rope_theta`.

    `linear` stretches all rotations by `factor`. `yarn` (arXiv 2309.00071) stretches slow ones,
    keeps fast ones, and ramps between those with `beta_slow` and `beta_fast` turns in
    `original_positions`; `llama3` does so with another ramp. `dynamic` changes nothing up to
    `original_positions`, and longer contexts are refused.
    """

    kind: str = "default"  # see ROPES
    interleaved: bool = False  # pairs are channels (2c, 2c + 1), as DeepSeek stores them
    rotated_channels: int = 0  # number of a head's first channels that rotate; 0: all
    factor: float = 1.0
    original_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # the ramp begins and ends at whole channels
    amplitude: float = 1.0  # factor of sines and cosines
    score_factor: float = 1.0  # factor of attention scores

    def __post_init__(self):
        _one_of("RopeConfig.kind", self.kind, ROPES)
        if self.kind == "linear" and self.factor < 1:
            raise ValueError(f"linear stretches by {self.factor=}, which must be >= 1")
        stretches_positions = self.kind not in ("default", "linear")
        if stretches_positions and (self.original_positions < 1 or self.factor < 1):
            raise ValueError(
                f"{self.kind} stretches {self.original_positions=} by {self.factor=}: both must be "
                ">= 1"
            )
        ramps = self.kind in ("yarn", "llama3")
        if ramps and not 0 < self.beta_slow <= self.beta_fast:
            raise ValueError(
                f"{self.kind} ramps from {self.beta_slow=} to {self.beta_fast=}, which must be "
                "positive and in this order"
            )
        if self.kind == "llama3" and self.beta_slow == self.beta_fast:
            raise ValueError(f"llama3 needs a ramp, but {self.beta_slow=} and {self.beta_fast=}")
        if self.rotated_channels % 2:
            raise ValueError(f"{self.rotated_channels=} must be even, RoPE rotates pairs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    The cache holds a latent of `kv_rank` channels and one rotated key of `rope_channels` per token,
    for all heads.
    """

    kv_rank: int
    rope_channels: int
    plain_channels: int  # of a head's query and key that are not rotated
    value_channels: int
    q_rank: int = 0  # rank of compressed queries; 0: queries are not compressed

    def __post_init__(self):
        check_positive(self, "kv_rank", "rope_channels", "plain_channels", "value_channels")
        if self.rope_channels % 2:
            raise ValueError(f"{self.rope_channels=} must be even, RoPE rotates pairs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Choice and weights of K of E experts; see `eep_jax.models.router.choose`.

    With `groups` > 1, only experts of the `groups_kept` best groups can be chosen.
    """

    score: str = "softmax"  # see SCORES
    bias: bool = False  # added to the logits
    correction: bool = False  # a bias added to scores for the choice, not for the weights
    groups: int = 1
    groups_kept: int = 1
    group_score: str = "max"  # see GROUP_SCORES
    scaling: float = 1.0  # factor of the final weights
    sum_min: float = 0.0  # least sum by which weights are divided

    def __post_init__(self):
        _one_of("RouterConfig.score", self.score, SCORES)
        _one_of("RouterConfig.group_score", self.group_score, GROUP_SCORES)
        if not 1 <= self.groups_kept <= self.groups:
            raise ValueError(f"{self.groups_kept=} must be between 1 and {self.groups=}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and options of an MoE decoder. All lengths are in tokens or channels.

    The defaults are those of Qwen3-MoE (arXiv 2505.09388). `eep_jax.models.families` reads it from
    the Hugging Face `config.json` of every supported family.

    Raises:
        ValueError: Two values contradict each other; the message holds both.
    """

    name: str
    vocab_size: int  # V
    hidden: int  # D
    layers: int  # L
    query_heads: int
    kv_heads: int
    head_dim: int  # C in the shapes of attention
    experts: int  # E
    experts_per_token: int  # K
    expert_hidden: int  # F
    norm_topk_prob: bool = True  # renormalise the K router weights to sum to one
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    bos_token: int = 0
    eos_token: int = 0
    more_eos_tokens: tuple[int, ...] = ()  # further tokens that end a completion
    tied_embeddings: bool = False  # the output head shares the embedding's weights
    qk_norm: str = "head"  # over each head, over all channels, or none; see QK_NORMS
    qkv_bias: bool = False
    output_bias: bool = False  # of attention's last projection
    windows: tuple[
        int, ...
    ] = ()  # attention window of each layer, 0: all positions; (): no windows
    sinks: bool = False  # a learned score per head in the softmax's denominator
    rope: RopeConfig = RopeConfig()
    latent: LatentConfig | None = None  # latent attention instead of grouped queries
    router: RouterConfig = RouterConfig()
    activation: str = "swiglu"  # of routed experts, see ACTIVATIONS
    activation_limit: float = 7.0  # clamp of clamped_swiglu
    activation_slope: float = 1.702  # slope of its sigmoid
    expert_biases: bool = False
    dense_layers: int = 0  # number of first layers with a plain MLP instead of experts
    dense_hidden: int = 0  # channels of that MLP
    shared_hidden: int = 0  # channels of the expert shared by all tokens; 0: none
    shared_gate: bool = False  # a sigmoid of the token weights the shared expert

    def __post_init__(self):
        check_positive(
            self, "vocab_size", "hidden", "layers", "query_heads", "kv_heads", "expert_hidden"
        )
        if self.query_heads % self.kv_heads:
            raise ValueError(f"{self.query_heads=} must be a multiple of {self.kv_heads=}")
        if self.rope_theta <= 1 or self.norm_eps < 0:
            raise ValueError(f"{self.rope_theta=} must exceed 1, {self.norm_eps=} be at least 0")
        if self.shared_hidden < 0:
            raise ValueError(f"{self.shared_hidden=} must be at least 0")
        if not 0 < self.experts_per_token <= self.experts:
            raise ValueError(f"{self.experts_per_token=} must be between 1 and {self.experts=}")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"{self.head_dim=} must be even, RoPE rotates pairs")
        _one_of("ModelConfig.qk_norm", self.qk_norm, QK_NORMS)
        _one_of("ModelConfig.activation", self.activation, ACTIVATIONS)
        self._check_layers()
        self._check_router()

    def _check_layers(self) -> None:
        if not 0 <= self.dense_layers < self.layers:
            raise ValueError(
                f"{self.dense_layers=} must be at least 0 and less than {self.layers=}"
            )
        if self.dense_layers and self.dense_hidden < 1:
            raise ValueError(f"{self.dense_hidden=} must be positive if {self.dense_layers=}")
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(f"{self.windows=} must have one window for each of {self.layers=}")
        if min(self.windows, default=0) < 0:
            raise ValueError(f"{self.windows=} must be positive, or 0 for none")
        if self.rope.rotated_channels > self.head_dim:
            raise ValueError(f"{self.rope.rotated_channels=} must be at most {self.head_dim=}")
        if self.latent and (self.windows or self.sinks or self.qkv_bias or self.output_bias):
            raise ValueError(
                f"latent attention has no windows, sinks or biases, but {self.windows=}, "
                f"{self.sinks=}, {self.qkv_bias=} and {self.output_bias=}"
            )

    def _check_router(self) -> None:
        router, groups = self.router, self.router.groups
        if self.experts % groups:
            raise ValueError(f"{self.experts=} must be a multiple of {self.router.groups=}")
        if self.experts // groups * router.groups_kept < self.experts_per_token:
            raise ValueError(
                f"{self.experts_per_token=} must fit into {self.router.groups_kept=} of {groups} "
                f"groups of {self.experts // groups} experts"
            )

    @property
    def moe_layers(self) -> int:
        """Number of layers with routed experts, L of a bank. They are the last layers."""
        return self.layers - self.dense_layers

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a completion."""
        return frozenset((self.eos_token, *self.more_eos_tokens))

    @property
    def bias_rows(self) -> int:
        """Rows of D that hold the biases of one expert matrix, below its F rows."""
        return -(-max(self.expert_hidden, self.hidden) // self.hidden) if self.expert_biases else 0

    @property
    def expert_shape(self) -> tuple[int, int, int, int]:
        """Shape of one expert, all its layers: [L, 3 (gate, up, down transposed), F, D].

        With biases, F grows by `bias_rows`: their first F values are the bias of gate or up, their
        first D values that of down.
        """
        return (self.moe_layers, 3, self.expert_hidden + self.bias_rows, self.hidden)

    @property
    def expert_elements(self) -> int:
        layers, matrices, rows, columns = self.expert_shape
        return layers * matrices * rows * columns

    @property
    def cache_channels(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(heads, channels) of the cached keys and of the cached values per token and layer."""
        if self.latent:
            return (1, self.latent.rope_channels), (1, self.latent.kv_rank)
        return (self.kv_heads, self.head_dim), (self.kv_heads, self.head_dim)

    @property
    def heads_per_key(self) -> int:
        """Query heads that share a key head."""
        return self.query_heads // self.kv_heads

    @property
    def cache_elements(self) -> int:
        """Cached elements of one token, all layers."""
        return self.layers * sum(heads * channels for heads, channels in self.cache_channels)

    @property
    def dense_parameters(self) -> int:
        """Number of weights outside the routed experts, which every rank holds."""
        hidden, layers = self.hidden, self.layers
        mlps = self.dense_layers * 3 * hidden * self.dense_hidden
        shared = self.moe_layers * hidden * (3 * self.shared_hidden + self.shared_gate)
        router = self.router.bias + self.router.correction
        routers = self.moe_layers * self.experts * (hidden + router)
        ends = (1 if self.tied_embeddings else 2) * self.vocab_size * hidden + hidden
        return ends + layers * (2 * hidden + self._attention_parameters) + mlps + shared + routers

    @property
    def _attention_parameters(self) -> int:
        hidden, heads, latent = self.hidden, self.query_heads, self.latent
        if latent:
            query = heads * (latent.plain_channels + latent.rope_channels)
            queries = hidden * query
            if latent.q_rank:
                queries = latent.q_rank * (hidden + 1 + query)
            kept = hidden * (latent.kv_rank + latent.rope_channels) + latent.kv_rank
            expand = latent.kv_rank * heads * (latent.plain_channels + latent.value_channels)
            return queries + kept + expand + heads * latent.value_channels * hidden
        query, key = heads * self.head_dim, self.kv_heads * self.head_dim
        norms = {"head": 2 * self.head_dim, "full": query + key, "none": 0}[self.qk_norm]
        biases = self.qkv_bias * (query + 2 * key) + self.output_bias * hidden
        return hidden * (2 * query + 2 * key) + norms + biases + self.sinks * heads

    @property
    def parameters(self) -> int:
        """Number of weights in the whole model."""
        expert = self.moe_layers * 3 * self.expert_hidden * self.hidden
        biases = self.expert_biases * self.moe_layers * (2 * self.expert_hidden + self.hidden)
        return self.dense_parameters + self.experts * (expert + biases)


def model_from_values(values: dict) -> ModelConfig:
    """The inverse of `dataclasses.asdict`, also after a round trip through JSON.

    Raises:
        TypeError, ValueError: `values` is not the dictionary of a ModelConfig.
    """
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    parts = {"rope": RopeConfig, "latent": LatentConfig, "router": RouterConfig}
    for name, kind in parts.items():
        if isinstance(values.get(name), dict):
            values[name] = kind(**values[name])
    return ModelConfig(**values)
