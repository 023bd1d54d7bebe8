"""Stopwatch of a rank for a change of epoch: seconds by phase, and experts moved."""

import contextlib
import dataclasses
import time

from eep_jax.relocation.executor import Executor
from eep_jax.runtime.control.messages import ChangeTimes, StartTimes


class ChangeTimer:
    """`times` are those of the last committed change, None before the first.

    The moves of an abandoned change count for the next one, its seconds do not.
    """

    def __init__(self, executor: Executor):
        self._executor = executor
        self._moved, self._bytes_moved = {}, {}  # as they were at the last commit
        self._load_s = self._detach_s = self._fetch_s = 0.0
        self._committed_s: float | None = None  # while no step counted since
        self.start: StartTimes | None = None  # sent with the first change
        self.times: ChangeTimes | None = None

    @contextlib.contextmanager
    def loading(self):
        started = time.monotonic()
        yield
        self._load_s += time.monotonic() - started

    def detached(self, seconds: float) -> None:
        self._detach_s = seconds

    @contextlib.contextmanager
    def fetching(self):
        started = time.monotonic()
        yield
        self._fetch_s = time.monotonic() - started

    @contextlib.contextmanager
    def committing(self, epoch: int):
        started = time.monotonic()
        yield
        self._committed_s = time.monotonic()
        executor = self._executor
        self.times = ChangeTimes(
            epoch=epoch,
            load_s=self._load_s,
            detach_s=self._detach_s,
            fetch_s=self._fetch_s,
            commit_s=self._committed_s - started,
            first_step_s=None,
            moved=_more(executor.moved, self._moved),
            bytes_moved=_more(executor.bytes_moved, self._bytes_moved),
            start=self.start,
        )
        self.start = None
        self._moved, self._bytes_moved = dict(executor.moved), dict(executor.bytes_moved)
        self._load_s = self._detach_s = self._fetch_s = 0.0

    @property
    def is_waiting(self) -> bool:
        """Whether no step was committed since the last change."""
        return self._committed_s is not None

    def stepped(self) -> bool:
        """Notes a committed step; True if it was the first since the last change."""
        if self._committed_s is None:
            return False
        first_step_s = time.monotonic() - self._committed_s
        self.times = dataclasses.replace(self.times, first_step_s=first_step_s)
        self._committed_s = None
        return True


def _more(now: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {k: n - before.get(k, 0) for k, n in now.items() if n > before.get(k, 0)}
