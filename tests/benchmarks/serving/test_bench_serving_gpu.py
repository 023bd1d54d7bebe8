"""The loads of one GPU: what they measure, and that an answer that changes is no result."""

import asyncio

import pytest

from benchmarks import bench_serving_gpu as bench
from benchmarks.harness import Unfit
from launch.load import Sample, Target


def a_sample(job: int, text: str = "abc", *, start: float = 0.0, error=None) -> Sample:
    """Three tokens, after 10, 14 and 20 ms."""
    pieces = tuple((start + at / 1000, 1) for at in (10, 14, 20))
    return Sample(
        job=job,
        text=text,
        finish_reason="length",
        error=error,
        refused=False,
        start_s=start,
        end_s=start + 0.02,
        pieces=pieces,
        prompt_tokens=5,
        output_tokens=3,
    )


def test_a_line_has_the_rate_of_all_and_the_times_of_each():
    line = bench.Line(bench.LOADS[0], [a_sample(0), a_sample(1, start=1.0)], seconds=2.0)
    values = {name: round(value, 6) for name, (value, _) in line.values().items()}
    assert values == {
        "output_tokens_per_s": 3.0,
        "ttft_p50": 10.0,
        "ttft_p99": 10.0,
        "gap_p50": 4.0,
        "gap_p99": 6.0,
    }


def test_the_same_prompts_are_asked_again_and_all_others_differ():
    first, again = (load for load in bench.LOADS if load.prompt == 8000)
    assert first.workload() == again.workload()
    assert len({load.workload() for load in bench.LOADS}) == len(bench.LOADS) - 1


@pytest.mark.parametrize(
    ("texts", "message"),
    [(["abc"], None), (["abc", "abd"], "differs"), ([None], "was lost")],
)
def test_lost_and_changed_answers_are_no_result(monkeypatch, texts, message):
    loads, calls = bench.QUICK[2:], []

    async def run(target, jobs, pace, count):
        text = texts[len(calls) % len(texts)]
        calls.append(count)
        return [a_sample(job, text or "", error=None if text else "gone") for job in range(count)]

    monkeypatch.setattr(bench, "run", run)
    measure = bench.measure(Target(url="http://nowhere"), "m", loads)
    if message is None:
        assert len(asyncio.run(measure)) == len(loads)
    else:
        with pytest.raises(Unfit, match=message):
            asyncio.run(measure)
