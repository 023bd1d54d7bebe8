"""Experts that are wanted next are on their way while others are written.

A source alone rarely keeps a machine busy: one connection is served by one core at each end, and
every fetch begins with questions. So several go on at once, each in a thread.
"""

from collections.abc import Callable, Hashable, Sequence

from eep_jax.placement.sources import Source
from eep_jax.relocation.patience import Pending

Wanted = tuple[int, Source]  # an expert, and the source that will be asked for it


class Prefetcher:
    """Fetches of one repair, in the order of `wanted`. Of one thread."""

    def __init__(
        self,
        wanted: Sequence[Wanted],
        begin: Callable[[int, Source], Pending],
        key: Callable[[Source], Hashable],
        at_once: int,
    ):
        """At most `at_once` experts are under way, or wait to be taken, beside the last one taken.

        Sources of one `key` fail together. From each, one expert comes alone first: what hangs, or
        is gone, costs no more than it would if experts were fetched one by one.
        """
        self._wanted, self._begin, self._key = list(wanted), begin, key
        self._at_once = at_once
        self._begun: dict[Wanted, Pending] = {}
        self._proven: set[Hashable] = set()

    def take(self, expert: int, source: Source, wait: Callable[[Pending], object]):
        """(what `wait` makes of this fetch, seconds it took); others go on meanwhile.

        Raises what the fetch raises; then its source has to prove itself again.
        """
        wanted, key = (expert, source), self._key(source)
        self._wanted = [other for other in self._wanted if other != wanted]
        pending = self._begun.pop(wanted, None) or self._begin(expert, source)
        self._begin_more(self._at_once - 1)
        try:
            found = wait(pending)
        except BaseException:
            self._proven.discard(key)
            raise
        self._proven.add(key)
        self._begin_more(self._at_once)
        return found, pending.seconds

    def _begin_more(self, at_most: int) -> None:
        ready = [wanted for wanted in self._wanted if self._key(wanted[1]) in self._proven]
        for wanted in ready[: max(0, at_most - len(self._begun))]:
            self._wanted.remove(wanted)
            self._begun[wanted] = self._begin(*wanted)
