"""The commands of several GPUs as a user starts them, on CPU ranks and with tiny shapes."""

import json

import pytest

from benchmarks.harness import read
from tests.benchmarks.processes import assert_refused, run_module


@pytest.mark.multiprocess
@pytest.mark.timeout(240)
def test_one_command_checks_and_times_exchanges_and_says_what_was_aimed_at(tmp_path):
    done = run_module(
        "benchmarks.multi_gpu",
        "--platform=cpu",
        "--parts=exchange",
        "--budget_s=200",
        f"--out={tmp_path}",
        deadline_s=230,
        quick=True,
    )
    assert done.returncode == 0, done.stdout
    records = read(sorted(tmp_path.glob("*.jsonl")))
    assert all(r.shape["link"] == "cpu" and r.ranks == 2 for r in records)
    times = {
        (r.bench, r.shape["tokens"], r.shape.get("combine"))
        for r in records
        if r.metric == "time p50"
    }
    for tokens in (4, 16):
        assert ("wide_dispatch", tokens, None) in times
        assert ("wide_collective", tokens, None) in times
        assert {("wide_combine", tokens, mode) for mode in ("per_choice", "per_rank")} <= times
    assert json.loads((tmp_path / "parts.json").read_text())[0]["status"] == "done"
    assert "not measured" in done.stdout and "exchange" in done.stdout


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(240)
def test_a_whole_step_is_compared_with_plain_experts_and_with_static_sharding(tmp_path):
    out = tmp_path / "decode.jsonl"
    done = run_module(
        "benchmarks.bench_wide_decode",
        "--platform=cpu",
        "--batches=8",
        "--layers=1",
        "--samples=2",
        "--systems=live,fixed,all_to_all",
        "--deadline_s=200",
        f"--out={out}",
        deadline_s=230,
        quick=True,
    )
    assert done.returncode == 0, done.stdout
    rates = {r.shape["system"]: r for r in read([out]) if r.metric == "tokens_per_s"}
    assert list(rates) == ["live", "fixed", "all_to_all"]
    assert {r.shape["against"] for r in rates.values()} == {"all_to_all"}
    assert "live / compiled-in membership" in done.stdout


@pytest.mark.multiprocess
@pytest.mark.timeout(120)
def test_experts_of_another_process_are_brought_and_compared_bit_by_bit(tmp_path):
    out = tmp_path / "relocation.jsonl"
    arguments = ("--platform=cpu", "--config=tiny_cpu", "--samples=2", "--deadline_s=90")
    done = run_module("benchmarks.bench_wide_sources", *arguments, f"--out={out}", deadline_s=110)
    assert done.returncode == 0, done.stdout
    found = {r.metric: r for r in read([out])}
    assert set(found) == {"peer moved", "peer checked"}
    assert all(r.ratio > 0 and r.baseline > 0 for r in found.values())


def test_what_cannot_be_measured_is_refused():
    cases = [
        ("bench_wide", ["--tokens=0"], "--tokens=0 must be positive numbers"),
        ("bench_wide", ["--top_k=9", "--experts=4"], "there are not so many"),
        ("bench_wide_decode", ["--systems=nccl"], "['nccl'] are not among"),
        ("bench_wide_decode", ["--config=tiny_gpu"], "is for gpu, --platform=cpu"),
        ("bench_wide_sources", ["--config=tiny_gpu"], "is for gpu, --platform=cpu"),
    ]
    assert_refused([(f"benchmarks.{m}", ["--platform=cpu", *a], words) for m, a, words in cases])
