"""Sizes of an expert layer, and the RunConfig of a cluster that has nothing else. No JAX."""

import dataclasses

from eep_jax.config import (
    DTYPE_OF_PLATFORM,
    ClusterConfig,
    EngineConfig,
    ModelConfig,
    RunConfig,
    ServeConfig,
)
from eep_jax.model_config import RouterConfig

# Name -> score of eep_jax.models.router.choose.
_SCORES = {
    "softmax_topk": "softmax",
    "sigmoid_topk": "sigmoid",
    "softmax_of_topk": "softmax_of_chosen",
}
ROUTERS = tuple(_SCORES)
_ROW_TILE = {"cpu": 8, "gpu": 16}
_DEADLINE_MS = {"cpu": 2_000, "gpu": 10_000}
# A program that left the run may have results to write; its rank's next process does not wait.
_LEFT_GRACE_MS = 60_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """One expert layer: E experts of width F on D channels, K of them for each token.

    Attributes:
        hidden: D.
        expert_hidden: F.
        experts: E.
        experts_per_token: K.
        router: `softmax_topk` (Qwen, OLMoE), `sigmoid_topk` (DeepSeek-V3, with correction, groups
            and scaling) or `softmax_of_topk` (Mixtral, gpt-oss).
        norm_topk_prob: Divide the K weights of a token by their sum.
        router_bias: Add a bias to the logits.
        router_correction: Choose, but do not weigh, by scores plus a bias; it has no gradient.
        router_groups: Groups of experts; experts outside the best groups are not chosen.
        router_groups_kept: Groups that are kept.
        router_group_score: `max` scores a group by its best expert, `top2` by the sum of its two
            best.
        router_scaling: Factor of the weights.
        activation: `swiglu`, or `clamped_swiglu` (gpt-oss).
        activation_limit: Bound of clamped values.
        activation_slope: Slope of the clamped sigmoid.
        expert_biases: Biases of gate, up and down.

    Raises:
        ValueError: Values contradict each other.

    Example:
        >>> from eep_jax import MoEConfig
        >>> MoEConfig(hidden=8, expert_hidden=4, experts=4, experts_per_token=2).weights_shape
        (4, 3, 4, 8)
    """

    hidden: int
    expert_hidden: int
    experts: int
    experts_per_token: int
    router: str = "softmax_topk"
    norm_topk_prob: bool = True
    router_bias: bool = False
    router_correction: bool = False
    router_groups: int = 1
    router_groups_kept: int = 1
    router_group_score: str = "max"
    router_scaling: float = 1.0
    activation: str = "swiglu"
    activation_limit: float = 7.0
    activation_slope: float = 1.702
    expert_biases: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden", "expert_hidden", "experts", "experts_per_token"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"MoEConfig.{name}={value} must be positive")
        if self.experts_per_token > self.experts:
            raise ValueError(
                f"{self.experts_per_token=} must be between 1 and {self.experts=}; "
                "add experts or lower experts_per_token"
            )
        if self.router not in ROUTERS:
            raise ValueError(f"{self.router=} must be one of {ROUTERS}")
        self.model()

    @property
    def weights_shape(self) -> tuple[int, int, int, int]:
        """[E, 3 (gate, up, down transposed), F, D], with rows below F for biases."""
        return (self.experts, *self.model().expert_shape[1:])

    def model(self, name: str = "library", layers: int = 1) -> ModelConfig:
        """A model of such layers alone, as the runtime sees it."""
        return ModelConfig(
            name=name,
            hidden=self.hidden,
            layers=layers,
            experts=self.experts,
            experts_per_token=self.experts_per_token,
            expert_hidden=self.expert_hidden,
            norm_topk_prob=self.norm_topk_prob,
            router=RouterConfig(
                score=_SCORES[self.router],
                bias=self.router_bias,
                correction=self.router_correction,
                groups=self.router_groups,
                groups_kept=self.router_groups_kept,
                group_score=self.router_group_score,
                scaling=self.router_scaling,
            ),
            activation=self.activation,
            activation_limit=self.activation_limit,
            activation_slope=self.activation_slope,
            expert_biases=self.expert_biases,
            # The runtime sees expert layers alone.
            vocab_size=1,
            query_heads=1,
            kv_heads=1,
            head_dim=2,
        )


def run_config(
    moe: MoEConfig,
    *,
    layers: int,
    ranks: int,
    slots_per_rank: int,
    tokens_max: int,
    name: str = "library",
    platform: str = "cpu",
    combine: str = "per_choice",
    step_deadline_ms: int = 0,
    **cluster: int | str | tuple[str, ...],
) -> RunConfig:
    """The configuration of a run, on which its supervisor and ranks agree.

    Args:
        moe: The expert layers of the model.
        layers: L, how many there are.
        ranks: R, processes of the run.
        slots_per_rank: S, experts that a rank has room for; R * S must be E * `redundancy` or more.
        tokens_max: Most rows that a step gives to one layer; rounded up to row tiles, two or more.
        name: Shown in logs and metrics.
        platform: `cpu` or `gpu`.
        combine: `per_choice` gives the same bits wherever experts are; `per_rank` sends less.
        step_deadline_ms: Wait for a peer before it is suspected. 0: 2 s on a CPU, 10 s on a GPU.
        **cluster: Fields of `eep_jax.config.ClusterConfig`, such as `redundancy`.
            `fenced_grace_ms` is 60 s unless given.

    Returns:
        The configuration, for `start_supervisor`.

    Raises:
        ValueError: Values contradict each other.

    Example:
        >>> from eep_jax import MoEConfig, run_config
        >>> moe = MoEConfig(hidden=8, expert_hidden=4, experts=4, experts_per_token=2)
        >>> config = run_config(moe, layers=2, ranks=2, slots_per_rank=2, tokens_max=20)
        >>> config.engine.tokens_max, config.cluster.fenced_grace_ms
        (24, 60000)
    """
    for label, value in (("layers", layers), ("tokens_max", tokens_max)):
        if value < 1:
            raise ValueError(f"{label}={value} must be positive")
    if platform not in _ROW_TILE:
        raise ValueError(f"{platform=} must be one of {tuple(_ROW_TILE)}")
    tile = _ROW_TILE[platform]
    cluster = {"fenced_grace_ms": _LEFT_GRACE_MS} | cluster
    engine = EngineConfig(
        batch_rows=tile,
        prefill_tokens=max(1, -(-(tokens_max - tile) // tile)) * tile,
        row_tile=tile,
        combine=combine,
        step_deadline_ms=step_deadline_ms or _DEADLINE_MS[platform],
        dtype=DTYPE_OF_PLATFORM[platform],
    )
    return RunConfig(
        name=name,
        model=moe.model(name, layers),
        cluster=ClusterConfig(ranks=ranks, slots_per_rank=slots_per_rank, **cluster),
        engine=engine,
        # The supervisor's HTTP API has status and metrics, but no completions.
        serve=ServeConfig(port=0, queue_max=0),
        platform=platform,
    )
