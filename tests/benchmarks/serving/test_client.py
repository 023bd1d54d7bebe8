"""The client of the serving benchmark counts what it gets, and no bad answer ends the load."""

import asyncio
import socket

import pytest

from benchmarks.harness import Sheet
from benchmarks.serving import statistics as stats
from launch.load import Pace, Target, run
from tests.benchmarks.serving.fake_server import fake_server

DEADLINE_S = 20.0


@pytest.fixture(scope="module")
def server():
    with fake_server() as (url, server):
        yield url, server


def load(url: str, jobs, pace: Pace | None = None, count: int | None = None):
    work = run(Target(url=url), jobs, pace or Pace(concurrency=2), count=count or len(jobs))
    return asyncio.run(asyncio.wait_for(work, DEADLINE_S))


def job(prompt: str, max_tokens: int = 5) -> dict:
    return {"model": "fake", "prompt": prompt, "max_tokens": max_tokens}


def test_a_stream_becomes_text_pieces_and_the_servers_own_counts(server):
    (sample,) = load(server[0], [job("abc")])
    assert (sample.text, sample.error, sample.finish_reason) == ("abcab", None, "length")
    assert (sample.prompt_tokens, sample.output_tokens) == (3, 5)
    assert [tokens for _, tokens in sample.pieces] == [1] * 5
    assert 0 < sample.ttft_s <= sample.e2e_s <= sample.end_s - sample.start_s
    assert sum(sample.gaps_s) == pytest.approx(sample.e2e_s - sample.ttft_s)
    assert sample.tpot_s == pytest.approx(sum(sample.gaps_s) / 4)
    assert server[1].bodies[-1]["stream_options"] == {"include_usage": True}


def test_refused_lost_and_wrong_are_counted_apart(server):
    jobs = [job(word) for word in ("fine", "refuse", "break", "error", "garbage")]
    samples = load(server[0], jobs)
    errors = {jobs[s.job]["prompt"]: s.error for s in samples}
    assert errors["fine"] is None
    assert "429" in errors["refuse"] and "too many" in errors["refuse"]
    assert "ended before" in errors["break"]
    assert "it broke" in errors["error"] and "cannot be read" in errors["garbage"]
    truth = {s.job: "other" for s in samples}
    assert stats.count(samples, truth) == stats.Counts(completed=1, lost=3, refused=1, wrong=1)
    assert stats.count(samples).wrong is None


def test_a_server_that_is_not_there_is_a_lost_request():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    (sample,) = load(url, [job("a")])
    assert sample.error is not None and not sample.refused
    with pytest.raises(ValueError, match="none of 1 requests completed"):
        stats.summarise([sample], 1.0)


def test_a_rate_sends_every_request_once_at_the_times_of_its_seed(server):
    pace = Pace(rate=500.0, seed=3)
    samples = load(server[0], [job("a"), job("bb")], pace, count=20)
    assert sorted(s.job for s in samples) == [0] * 10 + [1] * 10
    assert all(s.error is None for s in samples)


def test_until_an_event_lets_the_requests_in_flight_finish(server):
    async def story():
        enough, seen = asyncio.Event(), []

        def note(at_s: float, count: int) -> None:
            seen.append(count)
            if sum(seen) >= 40:
                enough.set()

        target, pace = Target(url=server[0]), Pace(concurrency=3)
        return await run(target, [job("abc")], pace, until=enough, on_token=note), seen

    samples, seen = asyncio.run(asyncio.wait_for(story(), DEADLINE_S))
    assert all(s.error is None and s.output_tokens == 5 for s in samples)
    assert sum(seen) == 5 * len(samples) >= 40


def test_tokens_longer_than_a_byte_are_estimated_where_nobody_says():
    from launch.load import _Stream

    stream = _Stream(Target(url="", bytes_per_token=4.0), lambda at_s, count: None)
    for text in ("abcdefgh", "ij", "klmnop"):
        stream._take({"choices": [{"text": text}]})
    assert [tokens for _, tokens in stream.pieces] == [2, 1, 1]


@pytest.mark.parametrize("values", [{}, {"concurrency": 1, "rate": 1.0}])
def test_a_pace_is_one_of_two(values):
    with pytest.raises(ValueError, match="exactly one"):
        Pace(**values)


def test_numbers_are_those_of_the_samples(server):
    samples = load(server[0], [job("abcd", 8)] * 10)
    serving = stats.summarise(samples, 2.0, {i: "abcdabcd" for i in range(10)})
    assert serving.requests_per_s == 5 and serving.output_tokens_per_s == 40
    assert serving.input_tokens_per_s == 20 and serving.counts.wrong == 0
    ttft = sorted(s.ttft_s * 1e3 for s in samples)
    assert serving.latencies["ttft"]["median"] == ttft[4]
    assert (
        serving.latencies["ttft"]["p90"] == ttft[8] and serving.latencies["ttft"]["p99"] == ttft[9]
    )
    sheet = Sheet("serve", "d", 1, {})
    stats.add_records(sheet, serving)
    by_name = {r.metric: r.value for r in sheet.records}
    assert {
        f"{name} {s}" for name in stats.LATENCIES for s in ("mean", "p50", "p90", "p95", "p99")
    } <= (by_name.keys())
    assert by_name["requests_lost"] == 0 and by_name["answers_wrong"] == 0
    report = "\n".join(stats.lines(serving))
    assert "Mean TTFT (ms):" in report and "P99 ITL (ms):" in report
