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
# A program that left the run has results to write; a new process of its rank need not wait for it.
_LEFT_GRACE_MS = 60_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """One expert layer: E experts of width F on D channels, K of them for each token.

    `softmax_topk` is the router of Qwen and OLMoE, `sigmoid_topk` that of DeepSeek-V3 (with
    `router_correction`, groups and scaling), `softmax_of_topk` that of Mixtral and gpt-oss (with
    `router_bias`). Experts are SwiGLU, or with `clamped_swiglu` and `expert_biases` gpt-oss's.
    Raises ValueError for values that contradict each other.
    """

    hidden: int  # D
    expert_hidden: int  # F
    experts: int  # E
    experts_per_token: int  # K
    router: str = "softmax_topk"  # see ROUTERS
    norm_topk_prob: bool = True  # divide the K weights of a token by their sum
    router_bias: bool = False  # added to the logits
    router_correction: bool = False  # a bias for choosing, not for weighing; gradients leave it
    router_groups: int = 1  # experts outside the best groups are not chosen
    router_groups_kept: int = 1
    router_group_score: str = "max"  # a group is as good as its best, "top2": its two best together
    router_scaling: float = 1.0  # of the weights
    activation: str = "swiglu"  # or "clamped_swiglu"
    activation_limit: float = 7.0
    activation_slope: float = 1.702
    expert_biases: bool = False

    def __post_init__(self):
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
        """Of all experts of the layer: [E, 3 (gate, up, down transposed), F, D].

        With biases there are rows below F that hold them, see `ModelConfig.expert_shape`.
        """
        return (self.experts, *self.model().expert_shape[1:])

    def model(self, name: str = "library", layers: int = 1) -> ModelConfig:
        """A model of nothing but such layers, as the runtime sees it."""
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
            # What follows is the user's own affair: the runtime sees expert layers alone.
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
    **cluster,
) -> RunConfig:
    """The run that supervisor and ranks agree on, for a model with `layers` expert layers.

    `tokens_max` is the most rows that a step gives to one layer; it is rounded up to two row tiles
    or more. `step_deadline_ms` 0 takes 2 s on CPU, 10 s on a GPU. `cluster` are further fields of
    ClusterConfig, such as `redundancy`; `fenced_grace_ms` is 60 s unless given. Raises ValueError
    for values that contradict each other.
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
        # The supervisor's HTTP side tells status and metrics; it has no completions to give.
        serve=ServeConfig(port=0, queue_max=0),
        platform=platform,
    )
