"""Requests have real text and lengths in their range, the same for the same seed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.serving.workload import TEXT, Workload, make_jobs

text = TEXT.read_text(encoding="utf-8")


@given(
    inputs=st.integers(1, 200),
    outputs=st.integers(1, 200),
    ratio=st.floats(0, 0.99),
    seed=st.integers(0, 9),
)
def test_lengths_are_in_their_range(inputs, outputs, ratio, seed):
    workload = Workload(
        input_tokens=inputs, output_tokens=outputs, range_ratio=ratio, distinct=8, seed=seed
    )
    jobs = make_jobs(workload, "m", text)
    assert jobs == make_jobs(workload, "m", text)
    for number, job in enumerate(jobs):
        assert job["prompt"] in text
        for name, mean, longest in zip(
            ("prompt", "max_tokens"), (inputs, outputs), workload.longest, strict=True
        ):
            length = len(job["prompt"]) if name == "prompt" else job[name]
            assert max(1, int(mean * (1 - ratio))) <= length <= longest
        assert (job["temperature"] == 0) == (number % 2 == 0) == ("seed" not in job)


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="longer --text_file"):
        make_jobs(Workload(input_tokens=64), "m", "In the beginning")


def test_a_ratio_out_of_range_is_refused():
    with pytest.raises(ValueError, match="range_ratio"):
        Workload(range_ratio=1.0)
