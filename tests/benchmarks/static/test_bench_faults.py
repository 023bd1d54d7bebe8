"""`python -m benchmarks.bench_faults` as a user starts it: both baselines survive in their way."""

import time

import pytest

from benchmarks.bench_faults import backed_up, has_record, repair_of
from benchmarks.harness import read
from tests.benchmarks.processes import assert_refused, run_module


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(600)
def test_each_baseline_serves_again_after_a_kill_and_what_it_lost_is_counted(tmp_path):
    out = tmp_path / "faults.jsonl"
    done = run_module(
        "benchmarks.bench_faults",
        "--ranks=3",
        "--systems=rejit,restart",
        "--before_s=1",
        "--after_s=1",
        "--output_len=16",
        f"--out={out}",
        deadline_s=580,
        quick=True,
    )
    assert done.returncode == 0, done.stdout
    records = {r.metric: r for r in read([out])}
    for system in ("rejit", "restart"):
        assert records[f"pause_s {system}"].value > records[f"detection_s {system}"].value > 0
        assert f"answers_changed {system}" in records
    assert records["requests_lost restart"].value > 0  # nobody else had them
    curves = {r.shape["system"]: r.shape["marks"] for r in read([out]) if r.metric == "timeline"}
    assert set(curves["rejit"]) == {"kill", "detected", "resumed"}
    assert "returned" in curves["restart"]


def test_what_cannot_be_done_is_refused():
    cases = [(["--systems=magic"], "['magic'] are not among"), (["--victim=4"], "must be in 1..3")]
    assert_refused([("benchmarks.bench_faults", *case) for case in cases])


def a_status(**changes) -> dict:
    """Two ranks of four experts, of which rank 1 was killed 5000 seconds ago."""
    repair = {"kind": "repair", "change": "repair", "time": time.time() - 4000, "seconds": {}}
    admission = repair | {"change": "admission", "time": time.time() - 2000}
    ranks = [{"rank": 0, "backups": [0, 1, 2]}, {"rank": 1, "backups": [3]}]
    return {"ranks": ranks, "events": [repair, admission]} | changes


def test_the_record_of_the_repair_is_that_of_the_change_after_the_kill():
    status, kill_s = a_status(), time.monotonic() - 5000
    assert repair_of(status, kill_s)["change"] == "repair"
    assert has_record(kill_s)(status)
    later_s = time.monotonic() - 3000
    assert repair_of(status, later_s) is None, "an admission is no repair"
    assert not has_record(later_s)(status)


def test_a_kill_waits_for_backups_of_what_only_the_victim_serves():
    ready = backed_up(victim=1)
    of = lambda *kept: a_status(
        experts={"placement": [[0, 1, -1], [1, 2, 3]]},
        ranks=[{"rank": rank, "backups": experts} for rank, experts in enumerate(kept)],
    )
    assert not ready(of([0, 1, 2], [3])) and not ready(of([], [0, 1, 2, 3]))
    assert ready(of([2, 3], []))
