"""Fields of routers like DeepSeek-V3's: sigmoid scores, and a correction of the choice."""

from eep_jax.model_config import RouterConfig
from eep_jax.models.families.config_json import Fields


def grouped_router(fields: Fields) -> RouterConfig:
    """The router of `n_group`, `topk_group` and `routed_scaling_factor`.

    Raises CheckpointError for a score or a method that no release with these fields has.
    """
    fields.require("scoring_func", "sigmoid")
    fields.require("topk_method", "noaux_tc")
    return RouterConfig(
        score="sigmoid",
        correction=True,
        groups=fields.take("n_group"),
        groups_kept=fields.take("topk_group"),
        group_score="top2",
        scaling=fields.take("routed_scaling_factor", float),
    )
