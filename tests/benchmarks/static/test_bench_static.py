"""`python -m benchmarks.bench_static` as a user starts it."""

import pytest

from benchmarks.harness import read
from tests.benchmarks.processes import assert_refused, run_module


@pytest.mark.multiprocess
@pytest.mark.timeout(300)
def test_elastic_and_static_ranks_are_checked_and_timed_in_one_run(tmp_path):
    out = tmp_path / "static.jsonl"
    done = run_module(
        "benchmarks.bench_static",
        "--ranks=2",
        "--blocks=2",
        "--steps=2",
        "--systems=elastic_fixed,elastic_once,all_to_all,ring,ragged_all_to_all",
        f"--out={out}",
        deadline_s=280,
        quick=True,
    )
    assert done.returncode == 0, done.stdout
    assert "ragged_all_to_all: left out, XLA:CPU does not implement it" in done.stdout
    records = {r.metric.split()[-1]: r for r in read([out])}
    assert list(records) == ["elastic_once", "elastic_fixed", "all_to_all", "ring"]
    best = max(("all_to_all", "ring"), key=lambda name: records[name].value)
    assert records["elastic_fixed"].shape["against"] == best
    assert records["elastic_once"].baseline == records["elastic_fixed"].value
    assert all(r.value > 0 and r.shape["samples"] == 2 for r in records.values())


def test_what_cannot_be_measured_is_refused():
    cases = [
        (["--systems=psum,nccl"], "['nccl'] are not among"),
        (["--systems=ragged_all_to_all"], "none is left"),
        (["--blocks=40", "--steps=40"], "has room for 488"),
    ]
    assert_refused([("benchmarks.bench_static", *case) for case in cases])
