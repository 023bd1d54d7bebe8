"""A filter of logs: a line that repeats is counted, not repeated."""

import logging
import threading
import time
from collections.abc import Callable

SHOWN = 5  # lines of one kind in a window
WINDOW_S = 10.0
KINDS_MAX = 512  # remembered at a time


class CountRepeats(logging.Filter):
    """Passes SHOWN warnings or errors of one call of the log within WINDOW_S seconds.

    The others are counted: the first line after the window says how many were left out. Lines are
    of one kind if they come from the same place in the code, whatever their values.
    """

    def __init__(self, now_s: Callable[[], float] = time.monotonic):
        super().__init__()
        self._now_s, self._lock = now_s, threading.Lock()
        self._kinds: dict[tuple, list] = {}  # place -> [end of its window, lines in it]

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        now_s, place = self._now_s(), (record.pathname, record.lineno)
        with self._lock:
            ends_s, count = self._kinds.pop(place, (0.0, 0))
            left_out = 0
            if now_s >= ends_s:
                left_out, count, ends_s = max(0, count - SHOWN), 0, now_s + WINDOW_S
            self._kinds[place] = [ends_s, count + 1]
            while len(self._kinds) > KINDS_MAX:
                del self._kinds[next(iter(self._kinds))]
        if left_out:
            record.msg = f"{record.getMessage()} ({left_out} more lines like this were left out)"
            record.args = ()
        return count < SHOWN
