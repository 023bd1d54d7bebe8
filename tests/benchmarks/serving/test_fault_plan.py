"""A plan says who is there in which phase; one that cannot be carried out is refused in words."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.serving.fault_plan import EXAMPLE, Phase, parse_plan


def test_the_example_kills_rank_2_and_brings_it_back():
    assert parse_plan(EXAMPLE, 4) == (
        Phase((0, 1, 2, 3)),
        Phase((0, 1, 2, 3), killed=(2,)),
        Phase((0, 1, 3)),
        Phase((0, 1, 2, 3), back=(2,)),
    )


@pytest.mark.parametrize("zero", ["-0", '"-0"'])
def test_rank_0_is_killed_by_minus_zero(zero):
    plan = parse_plan(f"[[0,1],[{zero},1],[1]]", 2)
    assert [p.killed for p in plan] == [(), (0,), ()]
    assert plan[1].label == "-0,1"


@pytest.mark.parametrize(
    "text, told",
    [
        ("[[0,1,2", "is not JSON"),
        ("[]", "must be a list of phases"),
        ("3", "must be a list of phases"),
        ("[[]]", "phase 0 is"),
        ("[[0,1,2],[0,1,4]]", "there is no rank 4, only 0..2"),
        ("[[0,1,2],[0,1,1.5]]", "1.5 is not a rank"),
        ("[[0,1,2],[0,1,true]]", "True is not a rank"),
        ("[[0,1,2],[0,1,2,-2]]", "rank 2 is listed twice"),
        ("[[0,1]]", "phase 0 leaves out ranks [2]"),
        ("[[0,1,2],[0,1]]", "write -2 there"),
        ("[[0,1,2],[-0,-1,-2]]", "kills every rank"),
        ("[[0,1,-2],[0,1],[0,1,-2]]", "brings back and kills rank 2 at once"),
    ],
)
def test_a_bad_plan_is_refused_with_what_to_write(text, told):
    with pytest.raises(ValueError, match=told.replace("[", r"\[")):
        parse_plan(text, 3)


@given(st.data())
def test_every_possible_story_is_read_as_it_was_written(data):
    """Random lives of ranks, written down as a plan."""
    ranks = data.draw(st.integers(1, 5))
    alive, words, stories = set(range(ranks)), [], []
    for number in range(data.draw(st.integers(1, 6))):
        away = sorted(set(range(ranks)) - alive)
        back = set(data.draw(st.sets(st.sampled_from(away)))) if away and number else set()
        old = sorted(alive)
        killed = set(data.draw(st.sets(st.sampled_from(old)))) if old else set()
        if killed == alive | back:
            killed.pop()
        present = sorted(alive | back)
        if not present:
            break
        words.append([f"-{r}" if r in killed else r for r in present])
        stories.append((tuple(present), tuple(sorted(killed)), tuple(sorted(back))))
        alive = set(present) - killed
    plan = parse_plan(json.dumps(words), ranks)
    assert [(p.present, p.killed, p.back) for p in plan] == stories
