"""A warning that repeats is counted, not repeated; nothing else is left out."""

import logging

from launch.repeated_lines import KINDS_MAX, SHOWN, WINDOW_S, CountRepeats


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def a_record(line: int, text: str = "from %s", *args, level=logging.WARNING):
    return logging.LogRecord("eep_jax", level, "server.py", line, text, args, None)


def test_lines_of_one_place_are_counted_and_said_with_the_next_one():
    clock = Clock()
    repeats = CountRepeats(clock)
    shown = [repeats.filter(a_record(7, "from %s", n)) for n in range(100)]
    assert shown == [True] * SHOWN + [False] * (100 - SHOWN)
    assert repeats.filter(a_record(8, "other")), "another place"
    clock.now_s += WINDOW_S
    late = a_record(7, "from %s", "x")
    assert repeats.filter(late)
    assert late.getMessage() == f"from x ({100 - SHOWN} more lines like this were left out)"
    again = a_record(7, "from %s", "y")
    assert repeats.filter(again) and again.getMessage() == "from y"


def test_what_is_no_warning_always_passes():
    repeats = CountRepeats(Clock())
    assert all(repeats.filter(a_record(7, "step", level=logging.INFO)) for _ in range(100))


def test_the_memory_for_places_has_an_end():
    repeats = CountRepeats(Clock())
    for line in range(3 * KINDS_MAX):
        assert repeats.filter(a_record(line, "x"))
    assert len(repeats._kinds) == KINDS_MAX
