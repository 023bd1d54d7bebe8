"""Health and status of the cluster, for people and monitors. Decides nothing."""

import dataclasses
from collections.abc import Callable

from eep_jax.config import RunConfig
from eep_jax.coordination.coordinator import missing
from eep_jax.coordination.state import CoordinatorState
from eep_jax.errors import CoverageLost
from eep_jax.membership.view import RankState
from eep_jax.placement.placement import require_room
from eep_jax.runtime.control.channels import Channels
from eep_jax.runtime.control.messages import Telemetry
from eep_jax.runtime.history.event_log import EventLog
from eep_jax.runtime.history.metrics import Metrics, imbalance, load_shares, replicas_min
from eep_jax.runtime.history.problems import all_silent, problems, waiting_for
from eep_jax.runtime.processes.registry import RankProcesses
from eep_jax.runtime.serving.request_table import RequestTable


class StatusReporter:
    """Reports on the supervisor's parts. `telemetry` is the last Telemetry of each rank."""

    def __init__(
        self,
        config: RunConfig,
        state: Callable[[], CoordinatorState],
        requests: RequestTable,
        event_log: EventLog,
        telemetry: dict[int, Telemetry],
        processes: RankProcesses,
        channels: Channels,
        journal_problem: Callable[[], str] = lambda: "",
        now_ms: Callable[[], int] = lambda: 0,
    ):
        self._config, self._state, self._requests = config, state, requests
        self._event_log, self._telemetry = event_log, telemetry
        self._processes, self._channels = processes, channels
        self._journal_problem, self._now_ms = journal_problem, now_ms
        self.draining = False  # a stop is wished for
        self.metrics = Metrics(state, requests, event_log, telemetry).text

    def phase(self) -> str:
        """`forming`, `serving`, `changing` (preparing an epoch), `blocked` or `draining`."""
        state = self._state()
        if self.draining:
            return "draining"
        if state.blocked:
            return "blocked"
        if state.view.epoch == 0:
            return "forming"
        return "changing" if state.change is not None else "serving"

    def health(self) -> tuple[bool, dict]:
        """(healthy, facts): healthy while requests are accepted and some member shows life."""
        state, phase = self._state(), self.phase()
        silence = all_silent(state, self._now_ms())
        facts = {
            "status": phase,
            "epoch": state.view.epoch,
            "active_ranks": list(state.view.with_state(RankState.ACTIVE)),
            "reason": state.blocked
            or (waiting_for(state) if phase == "forming" else "")
            or silence,
            "problems": self._problems(),
        }
        return phase in ("serving", "changing") and not silence, facts

    def _problems(self) -> list[str]:
        found = problems(self._state(), self._event_log.events)
        return found + [problem for problem in (self._journal_problem(),) if problem]

    def status(self) -> dict:
        """The whole state of the cluster as JSON values."""
        state = self._state()
        counts = self._requests.counts
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
                "unsupplied": sorted({expert for _, expert in state.shortages.reasons}),
                "replicas_min": replicas_min(state),
                "placement": [list(row) for row in state.placement.slots],
                "load": [round(share, 4) for share in load_shares(state)],
                "imbalance": imbalance(state),
            },
            "requests": {
                "waiting": self._requests.waiting,
                "running": self._requests.running,
                "accepted": counts["accepted"],
                "finished": counts["finished"],
                "cancelled": counts["cancelled"],
                "requeued": counts["requeued"],
                "tokens": counts["tokens"],
                "dropped_choices": counts["dropped_choices"],
            },
            "background": self.scale(),
            "events": list(self._event_log.events),
        }

    def scale(self) -> dict:
        """Ranks that are out or leaving, and the background work for it."""
        state = self._state()
        inside = state.view.in_epoch
        leaving = [rank for rank in inside if rank in state.out]
        task, change, waits_for = state.background.task, state.change, ""
        if leaving:
            try:
                require_room(state.placement, [rank for rank in inside if rank not in state.out])
            except CoverageLost as error:
                waits_for = str(error)
        return {
            "state": self.phase(),
            "epoch": state.view.epoch,
            # Background epochs that fetch experts may come first.
            "epoch_planned": change.view.epoch if change is not None else state.epoch_tried + 1,
            "draining": leaving,
            "drained": sorted(state.out - set(inside)),
            "waits_for": waits_for,
            "fetching": 0 if task is None else len(task.plan.moves),
            "reason": "" if task is None else task.reason,
        }

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
            "mode": status.mode.value if status is not None and record.is_current else None,
            "epoch": status.epoch if status is not None else 0,
            "requests": len(self._requests.of_rank(rank)),
            "compilations_after_start": telemetry.compilations if telemetry else 0,
            "steps": telemetry.steps if telemetry else 0,
            "steps_discarded": telemetry.discarded if telemetry else 0,
            "kv_cache": dataclasses.asdict(telemetry.cache)
            if telemetry and telemetry.cache
            else {},
            "experts_moved": dict(telemetry.moved) if telemetry else {},
            "backups": list(status.backup.experts) if status is not None else [],
            "source_bytes_per_s": dict(status.rates) if status is not None else {},
        }
