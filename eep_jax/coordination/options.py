"""The coordinator's options, as a run's configuration has them."""

from eep_jax.config import RunConfig
from eep_jax.coordination.state import CoordinatorOptions
from eep_jax.membership.detector import DetectorOptions
from eep_jax.placement.sources import SourceKind


def coordinator_options(config: RunConfig) -> CoordinatorOptions:
    cluster = config.cluster
    return CoordinatorOptions(
        ranks=cluster.ranks,
        experts=config.model.experts,
        slots_per_rank=cluster.slots_per_rank,
        redundancy=cluster.redundancy,
        background_experts=cluster.background_experts,
        imbalance_max=cluster.imbalance_max,
        degrade=cluster.policy == "degrade",
        sources=tuple(SourceKind(name) for name in cluster.sources),
        measured=cluster.source_order == "measured",
        formation_ms=cluster.formation_ms,
        fenced_grace_ms=cluster.fenced_grace_ms,
        restart_grace_ms=cluster.restart_grace_ms,
        detector=DetectorOptions(
            lease_ms=cluster.lease_ms,
            accused_lease_ms=cluster.accused_lease_ms,
            channel_grace_ms=cluster.channel_grace_ms,
            stall_ms=cluster.stall_ms,
        ),
    )
