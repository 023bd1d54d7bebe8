"""Promises to clients that count as broken."""

import dataclasses

import pytest

from benchmarks.serving.statistics import Counts, broken, texts_repeat
from launch.flags import load_config

GOOD = Counts(completed=5, lost=0, refused=0, wrong=0)


@pytest.mark.parametrize("name", ["tiny_cpu", "tiny_gpu", "small_moe_h100x1"])
def test_a_request_that_is_lost_or_refused_is_a_broken_promise_anywhere(name):
    config = load_config(name)
    assert not broken(GOOD, config)
    for field in ("lost", "refused"):
        assert broken(dataclasses.replace(GOOD, **{field: 1}), config)
        assert broken(dataclasses.replace(GOOD, wrong=None, **{field: 1}), None)


def test_another_text_is_one_unless_ties_of_drawn_weights_may_have_flipped_on_a_gpu():
    wrong = dataclasses.replace(GOOD, wrong=1)
    assert broken(wrong, load_config("tiny_cpu")) and broken(wrong, load_config("tiny_gpu"))
    assert broken(wrong, None)
    assert not broken(wrong, load_config("small_moe_h100x1"))
    drawn = dataclasses.replace(load_config("tiny_cpu"), checkpoint="", random_weights=3)
    assert texts_repeat(drawn), "on a CPU the order of sums is the same in both steps"
