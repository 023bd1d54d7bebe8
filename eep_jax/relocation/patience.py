"""Waiting for work that may hang: storage and networks answer late, or never."""

import threading
import time
from collections.abc import Callable, Hashable

BEAT_S = 0.05


class Patience:
    """Runs work in a thread while the caller waits, up to a deadline, and shows that it lives.

    Work that was given up may go on in its thread; while it does, no more work under its key is
    begun. So a disk that hangs costs one deadline and one thread, not one for each expert.
    """

    def __init__(self, deadline_ms: int, beat: Callable[[], None] = lambda: None):
        self._deadline_ms, self._beat = deadline_ms, beat
        self._given_up: dict[Hashable, threading.Thread] = {}

    def run(self, key: Hashable, work: Callable):
        """What `work()` returns or raises. Raises TimeoutError where it is not done in time."""
        before = self._given_up.get(key)
        if before is not None and before.is_alive():
            raise TimeoutError("an earlier read from it still hangs")
        outcome, done = [], threading.Event()

        def body() -> None:
            try:
                outcome.append((work(), None))
            except BaseException as error:
                outcome.append((None, error))
            done.set()

        thread = threading.Thread(target=body, name=f"fetch {key}", daemon=True)
        ends_s = time.monotonic() + self._deadline_ms / 1000
        thread.start()
        while not done.wait(min(BEAT_S, max(0.0, ends_s - time.monotonic()))):
            self._beat()
            if time.monotonic() >= ends_s:
                self._given_up[key] = thread
                raise TimeoutError(f"it took longer than {self._deadline_ms} ms")
        result, error = outcome[0]
        if error is not None:
            raise error
        return result
