"""Stopwatch of a new process: seconds by phase until it offers itself."""

import os
import time
import typing

from eep_jax.runtime.control.identity import start_ticks
from eep_jax.runtime.control.messages import StartTimes

if typing.TYPE_CHECKING:  # loading JAX is one of the phases
    from eep_jax.engine.protocol import WarmUp


class StartTimer:
    """Begins with the process itself. `phase` ends a phase and begins the next one.

    python        from the start of the process until this object is made
    ...           as given to `phase`
    executables   loading or compiling them       run   first runs of each
    """

    def __init__(self):
        age_s = _seconds_since_boot() - start_ticks(os.getpid()) / os.sysconf("SC_CLK_TCK")
        self._seconds = {"python": max(0.0, age_s)}
        self._before_s = time.monotonic()

    def phase(self, name: str) -> None:
        """Names the time since the last phase."""
        now_s = time.monotonic()
        self._seconds[name] = now_s - self._before_s
        self._before_s = now_s

    def done(self, warm: "WarmUp") -> StartTimes:
        """All phases, once the process has warmed up."""
        seconds = self._seconds | {"executables": warm.executables_s, "run": warm.run_s}
        return StartTimes(
            seconds={name: round(s, 4) for name, s in seconds.items()},
            executables=warm.origins,
            compilations=warm.compilations,
        )


def _seconds_since_boot() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
