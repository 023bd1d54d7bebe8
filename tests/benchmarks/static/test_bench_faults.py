"""`python -m benchmarks.bench_faults` as a user starts it: both baselines survive in their way."""

import pytest

from benchmarks.harness import read
from tests.benchmarks.processes import run_module


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


@pytest.mark.parametrize(
    "arguments, told",
    [(["--systems=magic"], "['magic'] are not among"), (["--victim=4"], "must be in 1..3")],
)
@pytest.mark.timeout(60)
def test_what_cannot_be_done_is_refused(arguments, told):
    done = run_module("benchmarks.bench_faults", *arguments, deadline_s=50)
    assert done.returncode == 2 and told in done.stdout, done.stdout
