"""What the supervisor tells people and monitors: health, status, metrics. Decides nothing."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from eep_jax.config import RunConfig
from eep_jax.coordination.coordinator import missing
from eep_jax.coordination.state import CoordinatorState
from eep_jax.errors import CoverageLost
from eep_jax.membership.view import RankState
from eep_jax.placement.balance import rank_loads
from eep_jax.placement.load import settled
from eep_jax.placement.placement import require_room
from eep_jax.placement.sources import median_rates
from eep_jax.runtime.channels import Channels
from eep_jax.runtime.chronicle import Chronicle
from eep_jax.runtime.messages import Telemetry
from eep_jax.runtime.problems import problems, waiting_for
from eep_jax.runtime.rank_processes import RankProcesses
from eep_jax.runtime.requests import RequestBook


class Reports:
    """Reads what a supervisor's parts know. `telemetry` is what each rank said last."""

    def __init__(
        self,
        config: RunConfig,
        state: Callable[[], CoordinatorState],
        book: RequestBook,
        chronicle: Chronicle,
        telemetry: dict[int, Telemetry],
        processes: RankProcesses,
        channels: Channels,
    ):
        self._config, self._state, self._book = config, state, book
        self._chronicle, self._telemetry = chronicle, telemetry
        self._processes, self._channels = processes, channels
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def phase(self) -> str:
        """`forming`, `serving`, `changing` (an epoch is being prepared) or `blocked`."""
        state = self._state()
        if state.blocked:
            return "blocked"
        if state.view.epoch == 0:
            return "forming"
        return "changing" if state.change is not None else "serving"

    def health(self) -> tuple[bool, dict]:
        """Healthy while requests are taken; a change of members is no illness."""
        state, phase = self._state(), self.phase()
        facts = {
            "status": phase,
            "epoch": state.view.epoch,
            "active_ranks": list(state.view.with_state(RankState.ACTIVE)),
            "reason": state.blocked or (waiting_for(state) if phase == "forming" else ""),
            "problems": self._problems(),
        }
        return phase in ("serving", "changing"), facts

    def _problems(self) -> list[str]:
        return problems(self._state(), self._chronicle.events)

    def status(self) -> dict:
        """Everything a person or a test may want to know of the cluster."""
        state = self._state()
        replicas = state.placement.replicas()
        counts = self._book.counts
        return {
            "state": self.phase(),
            "blocked": state.blocked,
            "problems": self._problems(),
            "epoch": state.view.epoch,
            "policy": self._config.cluster.policy,
            "ranks": [self._rank(rank) for rank in state.view.ranks],
            "experts": {
                "count": state.placement.experts,
                "missing": list(missing(state)),
                "dropped": list(state.dropped),
                "replicas_min": min(
                    len(replicas.get(e, ())) for e in range(state.placement.experts)
                ),
                "placement": [list(row) for row in state.placement.slots],
                "load": [round(share, 4) for share in self._load_shares()],
                "imbalance": self._imbalance(),
            },
            "requests": {
                "waiting": self._book.waiting,
                "running": self._book.running,
                "accepted": counts["accepted"],
                "finished": counts["finished"],
                "cancelled": counts["cancelled"],
                "requeued": counts["requeued"],
                "tokens": counts["tokens"],
                "dropped_choices": counts["dropped_choices"],
            },
            "background": self.scale(),
            "events": list(self._chronicle.events),
        }

    def scale(self) -> dict:
        """Who is out or on its way out, and what is done for it in the background."""
        state = self._state()
        inside = state.view.in_epoch
        leaving = [rank for rank in inside if rank in state.out]
        task, change, waits_for = state.background, state.change, ""
        if leaving:
            try:
                require_room(state.placement, [rank for rank in inside if rank not in state.out])
            except CoverageLost as error:
                waits_for = str(error)
        return {
            "state": self.phase(),
            "epoch": state.view.epoch,
            # Experts may have to be fetched before, in epochs of their own.
            "epoch_planned": change.view.epoch if change is not None else state.epoch_tried + 1,
            "draining": leaving,
            "drained": sorted(state.out - set(inside)),
            "waits_for": waits_for,
            "fetching": 0 if task is None else len(task.plan.moves),
            "reason": "" if task is None else task.reason,
        }

    def _load_shares(self) -> tuple[float, ...]:
        """Of all choices of late, those of each expert; empty while too few were counted."""
        loads = settled(self._state().load)
        return tuple(load / sum(loads) for load in loads)

    def _imbalance(self) -> float | None:
        """The measured load of the busiest rank to the mean; None while too little is known."""
        state, shares = self._state(), self._load_shares()
        if not shares or not state.view.in_epoch:
            return None
        found = rank_loads(state.placement, state.view.in_epoch, shares).values()
        return round(max(found) * len(found) / sum(found), 3) if sum(found) else None

    def _rank(self, rank: int) -> dict:
        state = self._state()
        member, record = state.view.members[rank], state.records[rank]
        telemetry = self._telemetry.get(rank)
        # The View names a rank's incarnation from its offer on, the record from its first Hello.
        status = record.status
        return {
            "rank": rank,
            "state": member.state.value,
            "drained": rank in state.out and rank not in state.view.in_epoch,
            "incarnation": record.incarnation,
            "pid": self._processes.pid_of(rank, record.incarnation),
            "host": self._channels.host_of(rank),
            "mode": status.mode.value if status is not None and record.believed else None,
            "epoch": status.epoch if status is not None else 0,
            "requests": len(self._book.of_rank(rank)),
            "compilations_after_start": telemetry.compilations if telemetry else 0,
            "steps": telemetry.steps if telemetry else 0,
            "steps_discarded": telemetry.discarded if telemetry else 0,
            "experts_moved": dict(telemetry.moved) if telemetry else {},
            "backups": list(status.backup.experts) if status is not None else [],
            "source_bytes_per_s": dict(status.rates) if status is not None else {},
        }

    def metrics(self) -> bytes:
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
            "eep_requests_waiting": ("Accepted requests on no rank.", self._book.waiting),
            "eep_requests_running": ("Requests on a rank.", self._book.running),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
        for name in ("accepted", "finished", "cancelled", "requeued", "tokens", "dropped_choices"):
            text = f"Since this supervisor started: {name.replace('_', ' ')}."
            yield CounterMetricFamily(f"eep_{name}", text, value=self._book.counts[name])
        text = "Events since this supervisor started, by kind."
        family = CounterMetricFamily("eep_events", text, labels=["kind"])
        for kind, number in sorted(self._chronicle.counts.items()):
            family.add_metric([kind], number)
        yield family
        yield from self._collect_changes()
        yield from self._collect_sources()

    def _collect_changes(self):
        """Repairs, admissions, drains and background work: how many, what moved, and how long."""
        totals = self._chronicle.totals
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

    def _collect_sources(self):
        """What could supply experts now, and what is being brought in the background."""
        state = self._state()
        statuses = {
            rank: r.status for rank, r in enumerate(state.records) if r.status and r.believed
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
        replicas = state.placement.replicas()
        fewest = min(len(replicas.get(e, ())) for e in range(state.placement.experts))
        yield GaugeMetricFamily(
            "eep_replicas_min", "Replicas of the expert that has fewest.", value=fewest
        )
        if (imbalance := self._imbalance()) is not None:
            yield GaugeMetricFamily(
                "eep_load_imbalance",
                "Load of the busiest rank to the mean, as experts were chosen.",
                value=imbalance,
            )
        task = state.background
        yield GaugeMetricFamily(
            "eep_background_moves",
            "Experts that are being brought while serving.",
            value=0 if task is None else len(task.plan.moves),
        )
