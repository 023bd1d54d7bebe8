"""Time as an argument, so that tests may bring their own."""

import time
from typing import Protocol


class Clock(Protocol):
    """Where a process loop takes its time from."""

    def now_ms(self) -> int:
        """Milliseconds of a clock that never goes back; its zero means nothing."""


class SystemClock:
    """The monotonic clock of this machine, the same for all its processes."""

    def now_ms(self) -> int:
        return time.monotonic_ns() // 1_000_000
