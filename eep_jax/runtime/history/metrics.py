"""Counts and gauges of the supervisor, in Prometheus' text format."""

import types
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from eep_jax.coordination.coordinator import missing
from eep_jax.coordination.state import CoordinatorState
from eep_jax.membership.view import RankState
from eep_jax.placement.balance import rank_loads
from eep_jax.placement.load import settled
from eep_jax.placement.sources import median_rates
from eep_jax.runtime.control.messages import Telemetry
from eep_jax.runtime.history.event_log import EventLog
from eep_jax.runtime.serving.request_table import RequestTable


def load_shares(state: CoordinatorState) -> tuple[float, ...]:
    """Each expert's share of recent choices; empty while too few were counted."""
    loads = settled(state.load.measured)
    return tuple(load / sum(loads) for load in loads)


def imbalance(state: CoordinatorState) -> float | None:
    """Load of the busiest rank divided by the mean; None while it is unknown."""
    shares = load_shares(state)
    if not shares or not state.view.in_epoch:
        return None
    found = rank_loads(state.placement, state.view.in_epoch, shares).values()
    return round(max(found) * len(found) / sum(found), 3) if sum(found) else None


def replicas_min(state: CoordinatorState) -> int:
    """The smallest number of replicas that any expert has."""
    replicas = state.placement.replicas()
    return min(len(replicas.get(e, ())) for e in range(state.placement.experts))


class Metrics:
    """A Prometheus collector over the supervisor's parts; counts start with the process."""

    def __init__(
        self,
        state: Callable[[], CoordinatorState],
        requests: RequestTable,
        event_log: EventLog,
        telemetry: Mapping[int, Telemetry] = types.MappingProxyType({}),
    ):
        self._state, self._requests, self._event_log = state, requests, event_log
        self._telemetry = telemetry
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def text(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self._registry)

    def collect(self):
        """Called by the registry at each scrape."""
        state = self._state()
        gauges = {
            "eep_epoch": ("Number of the committed View.", state.view.epoch),
            "eep_active_ranks": (
                "Ranks that take part in steps.",
                len(state.view.with_state(RankState.ACTIVE)),
            ),
            "eep_drained_ranks": (
                "Ranks that the operator took out.",
                len(state.out - set(state.view.in_epoch)),
            ),
            "eep_missing_experts": ("Experts without a live replica.", len(missing(state))),
            "eep_requests_waiting": ("Accepted requests on no rank.", self._requests.waiting),
            "eep_requests_running": ("Requests on a rank.", self._requests.running),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
        for name in (
            "accepted",
            "finished",
            "cancelled",
            "not_finite",
            "requeued",
            "tokens",
            "dropped_choices",
        ):
            text = f"Since this supervisor started: {name.replace('_', ' ')}."
            yield CounterMetricFamily(f"eep_{name}", text, value=self._requests.counts[name])
        text = "Events since this supervisor started, by kind."
        family = CounterMetricFamily("eep_events", text, labels=["kind"])
        for kind, number in sorted(self._event_log.counts.items()):
            family.add_metric([kind], number)
        yield family
        yield from self._collect_changes()
        yield from self._collect_sources()
        yield from self._collect_caches()

    def _collect_changes(self):
        """Number, moves, bytes and seconds of changes, by kind."""
        totals = self._event_log.totals
        for name, text, labels, counts in (
            ("eep_changes", "Changes of members or placement.", ("change",), totals.changes),
            (
                "eep_expert_moves",
                "Experts brought to slots, by the source that supplied them.",
                ("change", "source"),
                totals.moves,
            ),
            (
                "eep_expert_move_bytes",
                "Bytes of these experts.",
                ("change", "source"),
                totals.bytes,
            ),
            (
                "eep_change_seconds",
                "Seconds of changes by phase; load is beside serving, the others are the pause.",
                ("change", "phase"),
                totals.seconds,
            ),
        ):
            family = CounterMetricFamily(
                name, f"{text} Since this supervisor started.", labels=labels
            )
            for values, number in sorted(counts.items()):
                family.add_metric(values, number)
            yield family

    def _collect_caches(self):
        """Pages of each rank's KV cache; counts start with the rank."""
        uses = {rank: t.cache for rank, t in self._telemetry.items() if t.cache is not None}
        for kind, name, field, text in (
            (GaugeMetricFamily, "eep_kv_pages", "pages", "Pages of the KV cache."),
            (GaugeMetricFamily, "eep_kv_pages_held", "held", "Pages that sequences hold."),
            (GaugeMetricFamily, "eep_kv_pages_cached", "cached", "Pages with a known prefix."),
            (
                CounterMetricFamily,
                "eep_prefix_asked_tokens",
                "asked_tokens",
                "Tokens of requests that were admitted to the KV cache.",
            ),
            (
                CounterMetricFamily,
                "eep_prefix_hit_tokens",
                "hit_tokens",
                "Of these, tokens that a cached prefix had.",
            ),
            (
                CounterMetricFamily,
                "eep_preempted",
                "preempted",
                "Times that a sequence gave back its pages and waited.",
            ),
        ):
            family = kind(name, text, labels=["rank"])
            for rank, use in sorted(uses.items()):
                family.add_metric([str(rank)], getattr(use, field))
            yield family

    def _collect_sources(self):
        """Current sources of experts, and moves in the background."""
        state = self._state()
        statuses = {
            rank: r.status for rank, r in enumerate(state.records) if r.status and r.is_current
        }
        backups = GaugeMetricFamily(
            "eep_backups", "Experts that a rank keeps in host memory.", labels=["rank"]
        )
        for rank, status in statuses.items():
            backups.add_metric([str(rank)], len(status.backup.experts))
        yield backups
        rates = GaugeMetricFamily(
            "eep_source_bytes_per_second",
            "Median over ranks of what each source of experts was measured to give.",
            labels=["source"],
        )
        for kind, rate in median_rates(s.rates for s in statuses.values()).items():
            rates.add_metric([kind.value], rate)
        yield rates
        yield GaugeMetricFamily(
            "eep_replicas_min",
            "Replicas of the expert that has fewest.",
            value=replicas_min(state),
        )
        if (found := imbalance(state)) is not None:
            yield GaugeMetricFamily(
                "eep_load_imbalance",
                "Load of the busiest rank to the mean, as experts were chosen.",
                value=found,
            )
        task = state.background.task
        yield GaugeMetricFamily(
            "eep_background_moves",
            "Experts that are being brought while serving.",
            value=0 if task is None else len(task.plan.moves),
        )
