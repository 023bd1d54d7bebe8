"""Waiting for work that may hang: storage and networks answer late, or never."""

import threading
import time
from collections.abc import Callable, Hashable

BEAT_S = 0.05


class Pending:
    """Work that goes on in a thread of its own."""

    def __init__(self, name: str, work: Callable, give_up: Callable[["Pending"], None]):
        """`give_up` is told once nobody waits for it any more."""
        self._give_up, self._done = give_up, threading.Event()
        self._result = self._error = None
        self.begun_s, self.seconds = time.monotonic(), 0.0  # the latter: that it took
        self._thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        self._thread.start()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def result(self, deadline_ms: int, beat: Callable[[], None]):
        """What it returned or raised. Raises TimeoutError where it takes longer."""
        ends_s = self.begun_s + deadline_ms / 1000
        while not self._done.wait(min(BEAT_S, max(0.0, ends_s - time.monotonic()))):
            beat()
            if time.monotonic() >= ends_s:
                self._give_up(self)
                raise TimeoutError(f"it took longer than {deadline_ms} ms")
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self, work: Callable) -> None:
        try:
            self._result = work()
        except BaseException as error:
            self._error = error
        self.seconds = time.monotonic() - self.begun_s
        self._done.set()


class DeadlineRunner:
    """Runs work in threads while the caller waits, up to a deadline, and shows that it lives.

    Work that was given up may go on in its thread; while it does, no more work under its key is
    begun. So a disk that hangs costs one deadline and one thread, not one for each expert.
    """

    def __init__(self, deadline_ms: int, beat: Callable[[], None] = lambda: None):
        self._deadline_ms, self._beat = deadline_ms, beat
        self._given_up: dict[Hashable, Pending] = {}

    def run(self, key: Hashable, work: Callable):
        """What `work()` returns or raises. Raises TimeoutError where it is not done in time."""
        return self.wait(self.begin(key, work))

    def begin(self, key: Hashable, work: Callable) -> Pending:
        """Has `work()` done meanwhile. Raises TimeoutError where earlier work still hangs."""
        before = self._given_up.get(key)
        if before is not None and before.is_alive():
            raise TimeoutError("an earlier read from it still hangs")
        give_up = lambda pending: self._given_up.__setitem__(key, pending)
        return Pending(f"fetch {key}", work, give_up)

    def wait(self, pending: Pending):
        """As `run`, of what was begun; the deadline counts from there."""
        return pending.result(self._deadline_ms, self._beat)
