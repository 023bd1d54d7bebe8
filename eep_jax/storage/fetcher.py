"""Slow reads in threads: deadlines, sources that hang, and several experts under way at once.

Storage and networks may answer late, or never, and a read cannot be interrupted. One that misses
its deadline is abandoned in its thread, and until that thread ends, no other read of the same
source starts. So a source that hangs costs one deadline and one thread, not one for each expert.
"""

import contextlib
import math
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, InvalidStateError, wait

BEAT_S = 0.05  # between two calls of `beat`


class Fetch(Future):
    """A read in daemon threads of its own; its result is what the last thread returns.

    A ThreadPoolExecutor joins its threads at exit, so a disk that hangs would block the exit.
    """

    def __init__(self, key: Hashable, work: Callable, threads: int = 1):
        """`key` names what hangs together, such as one disk or one peer. `work()` runs in each
        thread; to postpone the deadline, it sets `progress_s` to the monotonic time.
        """
        super().__init__()
        self.key, self.seconds, self.progress_s = key, 0.0, math.inf
        self._work, self._lock, self._running = work, threading.Lock(), threads
        self.threads: list[threading.Thread] = []

    def start(self) -> None:
        self.progress_s = self._begun_s = time.monotonic()
        for number in range(self._running):
            name = f"fetch {self.key} {number}"
            self.threads.append(threading.Thread(target=self._run, name=name, daemon=True))
        for thread in self.threads:
            thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether a thread still runs, even if the fetch was given up."""
        return any(thread.is_alive() for thread in self.threads)

    def _run(self) -> None:
        result = failure = None
        try:
            result = self._work()
        except BaseException as error:
            failure = error
        with self._lock:
            self._running -= 1
            if self._running:
                return
        self.seconds = time.monotonic() - self._begun_s
        with contextlib.suppress(InvalidStateError):  # it was given up
            self.set_result(result) if failure is None else self.set_exception(failure)


class Fetcher:
    """Starts fetches, and waits for them up to a deadline. Not thread-safe."""

    def __init__(self, deadline_ms: float = math.inf, beat: Callable[[], None] = lambda: None):
        """The deadline counts from the last progress. `beat` is called while `wait` waits."""
        self._deadline_ms, self._beat = deadline_ms, beat
        # Weak: a running thread keeps its fetch, and finished ones must not keep their results.
        self._started: weakref.WeakSet[Fetch] = weakref.WeakSet()

    def start(self, fetch: Fetch) -> Fetch:
        """Starts the fetch, or fails it with TimeoutError while an earlier one of its key hangs."""
        if any(earlier.key == fetch.key and self._hangs(earlier) for earlier in self._started):
            fetch.set_exception(TimeoutError("an earlier read from it still hangs"))
        else:
            self._started.add(fetch)
            fetch.start()
        return fetch

    def wait(self, fetch: Fetch, poll: Callable[[float], bool] | None = None) -> None:
        """Waits until the fetch is over, or `poll(seconds)`, which waits that long, is true."""
        poll = poll or (lambda seconds: bool(wait([fetch], seconds).done))
        while not poll(BEAT_S) and not self.is_over(fetch):
            self._beat()

    def is_over(self, fetch: Fetch) -> bool:
        """Whether the fetch is done. Gives it up with TimeoutError once its deadline has passed."""
        if not fetch.done() and self._hangs(fetch):
            with contextlib.suppress(InvalidStateError):  # it ended just now
                fetch.set_exception(TimeoutError(f"it took longer than {self._deadline_ms:.0f} ms"))
        return fetch.done()

    def _hangs(self, fetch: Fetch) -> bool:
        return fetch.is_alive and time.monotonic() - fetch.progress_s > self._deadline_ms / 1000


class Prefetcher[Wanted: Hashable]:
    """Fetches the experts that are wanted next while others are written to their slots.

    One connection rarely saturates a machine: one core serves it at each end, and every fetch
    begins with round trips. So several are under way, each in a thread. Not thread-safe.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        wanted: Iterable[Wanted],
        make: Callable[[Wanted], Fetch],
        at_once: int,
    ):
        """At most `at_once` fetches, and the last one taken, are under way or hold a result.

        Each source (`Fetch.key`) first supplies one expert alone: a source that hangs, or is gone,
        costs no more than if experts were fetched one by one.
        """
        self._fetcher, self._make, self._at_once = fetcher, make, at_once
        self._waiting = {each: make(each) for each in wanted}  # not started
        self._started: dict[Wanted, Fetch] = {}
        self._proven: set[Hashable] = set()  # keys

    def begin(self, wanted: Wanted) -> Fetch:
        """The started fetch of what is wanted now; starts others as well."""
        fetch = self._started.pop(wanted, None)
        if fetch is None:
            fetch = self._waiting.pop(wanted, None) or self._make(wanted)
            self._fetcher.start(fetch)
        self._start_more(self._at_once - 1)
        return fetch

    def take(self, fetch: Fetch) -> Fetch:
        """Waits for a fetch that `begin` returned. A failure makes its source unproven again."""
        self._fetcher.wait(fetch)
        if fetch.exception() is None:
            self._proven.add(fetch.key)
            self._start_more(self._at_once)
        else:
            self._proven.discard(fetch.key)
        return fetch

    def _start_more(self, at_most: int) -> None:
        ready = [each for each, fetch in self._waiting.items() if fetch.key in self._proven]
        for wanted in ready[: max(0, at_most - len(self._started))]:
            self._started[wanted] = self._fetcher.start(self._waiting.pop(wanted))
