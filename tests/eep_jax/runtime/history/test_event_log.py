"""Whatever happens is in the journal, the last events and the counts; changes are summed up."""

import pytest

from eep_jax.runtime.control.messages import ChangeTimes
from eep_jax.runtime.history import event_log
from eep_jax.runtime.history.event_log import EventLog
from eep_jax.runtime.history.journal import Journal, replay

COMMIT = {
    "epoch": 2,
    "change": "repair",
    "reason": "rank 1 is out",
    "members": {0: 1},
    "prepare_ms": 40,
    "drained": [],
}
TIMES = ChangeTimes(
    epoch=2,
    load_s=0.0,
    detach_s=0.001,
    fetch_s=0.002,
    commit_s=0.003,
    first_step_s=0.004,
    moved={"peer": 2},
    bytes_moved={"peer": 20},
)


@pytest.fixture
def journal(tmp_path):
    made = Journal(tmp_path / "journal.jsonl")
    yield made
    made.close()


def kinds(records) -> list[str]:
    return [record["kind"] for record in records]


def test_an_event_is_in_the_journal_first(journal, monkeypatch):
    told = EventLog(journal, lambda: 0, before=[{"kind": "commit", "epoch": 1}])
    told.note("offered", {"rank": 1})
    assert kinds(told.events) == ["commit", "offered"]
    assert list(told.events)[1:] == replay(journal.path)
    assert dict(told.counts) == {"offered": 1}, "counts are of this supervisor"

    def full(kind, facts):
        raise OSError("no space left")

    monkeypatch.setattr(journal, "append", full)
    with pytest.raises(OSError, match="no space left"):
        told.note("offered", {"rank": 2})
    assert kinds(told.events) == ["commit", "offered"]


def test_only_the_last_events_are_kept(journal, monkeypatch):
    monkeypatch.setattr(event_log, "EVENTS_MAX", 3)
    told = EventLog(journal, lambda: 0)
    for rank in range(5):
        told.note("offered", {"rank": rank})
    assert [event["rank"] for event in told.events] == [2, 3, 4]
    assert told.counts["offered"] == 5 and len(replay(journal.path)) == 5


def test_a_change_is_summed_up_once_its_ranks_have_told(journal):
    now_ms = 1_000
    told = EventLog(journal, lambda: now_ms, members=(0, 1))
    told.note("dead", {"rank": 1, "reason": "its process ended"}, silent_ms=30)
    told.note("prepare", {"epoch": 2})
    told.note("commit", COMMIT)
    told.note_costs()
    assert "repair" not in kinds(told.events), "rank 0 may still tell"
    told.add_times(0, TIMES)
    repair = told.events[-1]
    assert (repair["kind"], repair["reason"]) == ("repair", "its process ended")
    assert repair["seconds"]["detect"] == 0.03 and repair["moves"] == {"peer": 2}
    assert told.totals.changes["repair",] == 1
    told.add_times(0, TIMES)
    assert kinds(told.events).count("repair") == 1


def test_a_change_of_which_nobody_tells_is_summed_up_after_a_while(journal):
    now = [1_000]
    told = EventLog(journal, lambda: now[0], members=(0, 1))
    told.note("commit", COMMIT)
    now[0] += 60_000
    told.note_costs()
    assert told.events[-1]["silent_ranks"] == [0]
