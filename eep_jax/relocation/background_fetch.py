"""Filling of slots that no table names while steps go on.

Storage and networks are read, and digests computed, in threads. Between two steps there is one copy
of an expert out of a slot, or one write into a slot, so a step waits for no more than that.
"""

from collections.abc import Callable, Iterator

from eep_jax.errors import RelocationFailed
from eep_jax.placement.planner import Move
from eep_jax.relocation.executor import Executor
from eep_jax.storage.fetcher import Fetch


class BackgroundFetch:
    """Fills one slot at a time. Call from the engine thread only."""

    def __init__(self, executor: Executor, on_done: Callable[[], None] = lambda: None):
        """`on_done` is called, in a thread, once `advance` can go on."""
        self._executor, self._on_done = executor, on_done
        self._move: Move | None = None
        self._filling: Iterator[Fetch] = iter(())
        self._fetch: Fetch | None = None
        self.failure = ""  # of the last move that failed: every source, with its reason

    def advance(self, move: Move) -> bool | None:
        """Goes on with `move`, and forgets an earlier one.

        Returns:
            None while it is under way, else whether its slot now holds the expert.
        """
        if self._move != move:
            self._move, self._filling = move, self._executor.fill(move)
        elif not self._executor.fetcher.is_over(self._fetch):
            return None
        try:
            self._fetch = next(self._filling)
        except (StopIteration, RelocationFailed) as end:
            self._move, self._fetch, self.failure = None, None, str(end)
            return isinstance(end, StopIteration)
        self._fetch.add_done_callback(lambda _: self._on_done())
        return None
