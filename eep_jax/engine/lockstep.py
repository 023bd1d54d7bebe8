"""Lockstep of an epoch's ranks: they pause and wake together by words in each other's windows.

The kind of a step is agreed in the step before (the largest vote). When all votes are IDLE, the
ranks pause at the same round. A rank that finds work writes that round into every peer's `wake`
word; so a late reader still sees it, and an old word has no effect.
"""

import numpy as np

from eep_jax.heap.heap import CONTROL_BYTES, SymmetricHeap
from pallas_kernels.exchange.signals import post, sleep_on
from pallas_kernels.window import WindowLayout, view

CONTROL_REGIONS = ("abort", "doorbell", "wake")


class Lockstep:
    """The host side of one rank's window: abort word and wake words."""

    def __init__(self, layout: WindowLayout, heap: SymmetricHeap):
        """Raises ValueError for more ranks than a control page has wake words."""
        regions = [layout.regions[name] for name in CONTROL_REGIONS]
        if any(region.offset + region.bytes > CONTROL_BYTES for region in regions):
            raise ValueError(f"the wake words of {layout.ranks} ranks exceed {CONTROL_BYTES=}")
        self._words = [
            {region.name: view(page, region) for region in regions} for page in heap.control()
        ]
        self._flags, self._heap, self._rank = layout.flags, heap, heap.rank

    def abort(self, epoch: int) -> None:
        """Ends all waits of steps below `epoch`, now. Thread-safe."""
        word = self._words[self._rank]["abort"]
        is_new = int(word[0]) < epoch
        if is_new:
            post(word, epoch)
        self.nudge()
        if is_new:
            self._heap.post_abort(epoch)

    @property
    def aborted_epoch(self) -> int:
        return int(self._words[self._rank]["abort"][0])

    def clear_flags(self) -> None:
        """Clears the flags of earlier epochs. Call it while no step runs and no peer can send."""
        self._heap.fill_zero(self._flags.offset, self._flags.bytes)
        self.forget_wakes()

    def wake_peers(self, peers, paused_round: int) -> None:
        """Wakes the peers that paused at this round."""
        for peer in peers:
            words = self._words[peer]
            post(words["wake"][self._rank : self._rank + 1], paused_round)
            _ring(words["doorbell"])

    def forget_wakes(self) -> None:
        """Clears the wake words after a pause, so that none matches when the rounds wrap around."""
        self._words[self._rank]["wake"][...] = 0

    def is_woken(self, paused_round: int) -> bool:
        """Whether a peer has found work since all ranks paused at this round."""
        return bool(np.any(self._words[self._rank]["wake"] == np.uint32(paused_round)))

    def nudge(self) -> None:
        """Ends this rank's own sleep. Thread-safe."""
        _ring(self._words[self._rank]["doorbell"])

    def doorbell(self) -> int:
        """Read this before looking for work, and pass it to `sleep` if there was none."""
        return int(self._words[self._rank]["doorbell"][0])

    def sleep(self, seen_doorbell: int, timeout_ms: int) -> None:
        """Blocks until the doorbell differs from `seen_doorbell`, or the timeout; does not poll."""
        sleep_on(self._words[self._rank]["doorbell"], seen_doorbell, timeout_ms * 1_000_000)


def _ring(doorbell: np.ndarray) -> None:
    # Two ringers may write the same value: each wakes sleepers itself, and the reason was stored
    # before, where a reader that saw the old doorbell in between looks for it.
    post(doorbell, (int(doorbell[0]) + 1) & 0xFFFFFFFF)
