"""Status for people and monitors, in every phase of a cluster's life."""

import json

import pytest

from eep_jax.coordination.coordinator import initial_state
from eep_jax.coordination.protocol import Mode
from eep_jax.coordination.state import Ended, Measured
from eep_jax.placement.sources import Backup
from eep_jax.runtime.control.channels import Channels
from eep_jax.runtime.history.event_log import EventLog
from eep_jax.runtime.history.journal import Journal
from eep_jax.runtime.history.status import StatusReporter
from eep_jax.runtime.processes.local import LocalProcesses
from eep_jax.runtime.processes.registry import RankProcesses
from eep_jax.runtime.processes.remote import HostWatch
from eep_jax.runtime.serving.request_table import RequestTable
from tests.support.control_world import a_config
from tests.support.factories import ByHand, some_cluster

COUNTS = ("accepted", "finished", "cancelled", "requeued", "tokens", "dropped_choices")


@pytest.fixture
def cluster():
    """A coordinator of the size of the configuration, all of whose ranks serve."""
    cluster = ByHand(some_cluster(ranks=2, slots_per_rank=2), experts=4)
    cluster.join(0), cluster.join(1)
    cluster.settle()
    return cluster


class Reported:
    """What a supervisor's parts know, changed by hand, and the reporter on it."""

    def __init__(self, journal: Journal):
        config = a_config(slots_per_rank=2)
        self.state = initial_state(config.cluster, config.model.experts)
        self.requests = RequestTable(queue_max=8, finished_max=8, per_rank_max=8)
        self.event_log = EventLog(journal, lambda: 0)
        here = LocalProcesses(lambda: 0, print, print)
        elsewhere = HostWatch(config.name, lambda: 0, print, print)
        reporter = StatusReporter(
            config,
            lambda: self.state,
            self.requests,
            self.event_log,
            {},
            RankProcesses("a", here, elsewhere),
            Channels(),
        )
        self.status, self.health, self.metrics = reporter.status, reporter.health, reporter.metrics


@pytest.fixture
def supervisor(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    yield Reported(journal)
    journal.close()


def show(supervisor: Reported, cluster: ByHand) -> dict:
    """Lets the supervisor be in the cluster's state; returns its status as a client reads it."""
    supervisor.state = cluster.state
    return json.loads(json.dumps(supervisor.status()))


def test_a_new_cluster_is_forming(supervisor):
    status = supervisor.status()
    assert (status["state"], status["epoch"]) == ("forming", 0)
    assert [r["state"] for r in status["ranks"]] == ["absent", "absent"]
    assert [r["mode"] for r in status["ranks"]] == [None, None]
    assert status["experts"]["missing"] == [0, 1, 2, 3]
    assert not supervisor.health()[0]


def test_a_serving_cluster_is_healthy(supervisor, cluster):
    status = show(supervisor, cluster)
    assert (status["state"], status["epoch"], status["blocked"]) == ("serving", 1, "")
    assert [(r["mode"], r["incarnation"], r["epoch"]) for r in status["ranks"]] == [
        ("serving", 1, 1),
        ("serving", 1, 1),
    ]
    assert status["experts"]["missing"] == [] and status["experts"]["replicas_min"] == 1
    assert sorted(e for row in status["experts"]["placement"] for e in row) == [0, 1, 2, 3]
    assert supervisor.health() == (
        True,
        {
            "status": "serving",
            "epoch": 1,
            "active_ranks": [0, 1],
            "reason": "",
            "problems": [],
        },
    )


def test_a_change_is_no_illness(supervisor, cluster):
    cluster.feed(cluster.status(0, mode=Mode.HOLDING, accused=(1,)))
    assert show(supervisor, cluster)["state"] == "changing"
    assert supervisor.health()[0]


def test_without_coverage_it_is_blocked_and_says_why(supervisor, cluster):
    cluster.feed(Ended(1, 1))
    status = show(supervisor, cluster)
    assert status["state"] == "blocked" and "no live replica" in status["blocked"]
    assert len(status["experts"]["missing"]) == 2
    healthy, facts = supervisor.health()
    assert not healthy and facts["reason"] == status["blocked"]
    assert facts["active_ranks"] == [0]


def test_a_dead_rank_has_no_mode_and_no_pid(supervisor, cluster):
    cluster.feed(Ended(1, 1))
    dead = show(supervisor, cluster)["ranks"][1]
    assert (dead["state"], dead["mode"], dead["pid"]) == ("absent", None, None)
    assert dead["incarnation"] == 1


def test_every_count_is_in_the_status_and_in_the_metrics(supervisor):
    for value, name in enumerate(COUNTS, 1):
        supervisor.requests.counts[name] = value
    supervisor.event_log.counts["dead"] = 3
    status, metrics = supervisor.status(), supervisor.metrics().decode().splitlines()
    for value, name in enumerate(COUNTS, 1):
        assert status["requests"][name] == value
        assert f"eep_{name}_total {value}.0" in metrics
    assert 'eep_events_total{kind="dead"} 3.0' in metrics


def test_gauges_follow_the_state(supervisor, cluster):
    cluster.feed(Ended(1, 1))
    supervisor.state = cluster.state
    metrics = supervisor.metrics().decode().splitlines()
    assert {"eep_active_ranks 1.0", "eep_missing_experts 2.0", "eep_epoch 1.0"} <= set(metrics)


def test_what_changes_moved_and_took_is_counted_by_source_and_phase(supervisor):
    record = {
        "change": "repair",
        "moves": {"backup": 3, "peer": 1},
        "bytes": {"backup": 300, "peer": 100},
        "seconds": {"detect": 0.5, "fetch": 0.25, "first_step": None, "total": 0.75},
    }
    for _ in range(2):
        supervisor.event_log.totals.add(record)
    metrics = supervisor.metrics().decode().splitlines()
    assert {
        'eep_changes_total{change="repair"} 2.0',
        'eep_expert_moves_total{change="repair",source="backup"} 6.0',
        'eep_expert_moves_total{change="repair",source="peer"} 2.0',
        'eep_expert_move_bytes_total{change="repair",source="backup"} 600.0',
        'eep_change_seconds_total{change="repair",phase="detect"} 1.0',
        'eep_change_seconds_total{change="repair",phase="fetch"} 0.5',
    } <= set(metrics)
    assert not any('phase="total"' in line or 'phase="first_step"' in line for line in metrics)


def test_backups_and_rates_of_ranks_are_gauges(supervisor, cluster):
    backup, rates = Backup("127.0.0.1:5", (0, 2, 3)), {"peer": 4e9, "backup": 1e9}
    cluster.feed(cluster.status(0, mode=Mode.SERVING, epoch=1, backup=backup, rates=rates))
    supervisor.state = cluster.state
    metrics = supervisor.metrics().decode().splitlines()
    assert {
        'eep_backups{rank="0"} 3.0',
        'eep_backups{rank="1"} 0.0',
        'eep_source_bytes_per_second{source="peer"} 4e+09',
        "eep_replicas_min 1.0",
        "eep_background_moves 0.0",
    } <= set(metrics)


def test_the_measured_load_is_told_once_enough_is_known(supervisor, cluster):
    assert show(supervisor, cluster)["experts"]["imbalance"] is None
    row = supervisor.state.placement.slots[0]
    cluster.feed(Measured(tuple(300 if expert in row else 100 for expert in range(4))))
    experts = show(supervisor, cluster)["experts"]
    assert experts["imbalance"] == 1.5 and sorted(experts["load"]) == [0.125, 0.125, 0.375, 0.375]
    assert "eep_load_imbalance 1.5" in supervisor.metrics().decode().splitlines()
