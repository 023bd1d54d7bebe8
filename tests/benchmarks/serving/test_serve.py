"""`python -m benchmarks.serve` as a user starts it: on any server, and on a cluster of its own."""

import pytest

from benchmarks.harness import read
from tests.benchmarks.processes import assert_refused, run_module
from tests.benchmarks.serving.fake_server import fake_server
from tests.support.kept_steps import shared_steps


def serve(*arguments: str, deadline_s: float):
    return run_module("benchmarks.serve", *arguments, deadline_s=deadline_s)


@pytest.mark.timeout(120)
def test_any_openai_server_is_measured(tmp_path):
    out = tmp_path / "serve.jsonl"
    with fake_server() as (url, server):
        done = serve(
            f"--url={url}",
            "--num_prompts=12",
            "--num_warmups=3",
            "--request_rate=200",
            "--random_output_len=6",
            "--random_range_ratio=0",
            f"--out={out}",
            deadline_s=100,
        )
    assert done.returncode == 0, done.stdout
    assert "Mean TTFT (ms):" in done.stdout and "Output token throughput" in done.stdout
    assert len(server.bodies) == 15 and {b["max_tokens"] for b in server.bodies} == {6}
    records = {r.metric: r for r in read([out])}
    assert records["requests_completed"].value == 12 and records["requests_lost"].value == 0
    assert records["ttft p99"].unit == "ms" and records["cdf"].shape["points"]
    assert "answers_wrong" not in records  # there is nothing to compare with


def test_what_cannot_be_done_is_one_line_and_status_2():
    cases = [
        (["--fault_plan=[[0,1,2,3],[0,1,2]]"], "write -3 there"),
        (["--fault_plan=[[0,1]]", "--url=http://127.0.0.1:1"], "leave --url out"),
        (["--request_rate=1", "--concurrency=2"], "give one of them"),
        (["--random_input_len=400", "--random_output_len=400"], "has room for 512"),
    ]
    assert_refused([("benchmarks.serve", *case) for case in cases])


@pytest.mark.multiprocess
@pytest.mark.timeout(420)
def test_ranks_die_and_return_as_planned_and_nothing_is_lost(tmp_path):
    out = tmp_path / "serve.jsonl"
    with shared_steps(tmp_path, 4, ["--config=tiny_cpu"]):
        done = serve(
            "--config=tiny_cpu",
            "--fault_plan=[[0,1,2,3],[-0,1,2,3],[1,2,3],[0,1,2,3]]",
            "--phase_s=1.5",
            "--random_output_len=24",
            "--distinct_prompts=8",
            f"--run_dir={tmp_path}",
            f"--out={out}",
            deadline_s=400,
        )
    assert done.returncode == 0, done.stdout
    records = read([out])
    single = {r.metric: r.value for r in records}
    assert single["requests_lost"] == single["requests_refused"] == single["answers_wrong"] == 0
    assert single["requests_completed"] > 0 and single["pause_s"] > 0
    phases = [r for r in records if r.metric == "phase_tokens_per_s"]
    assert [r.shape["present"] for r in phases] == ["0,1,2,3", "-0,1,2,3", "1,2,3", "0,1,2,3"]
    assert all(r.value > 0 for r in phases)
    marks = next(r for r in records if r.metric == "timeline").shape["marks"]
    assert list(marks) == ["kill", "detected", "resumed", "return_start", "returned"]
    assert sorted(marks.values()) == list(marks.values())
